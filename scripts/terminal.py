"""Lets a command print on any terminal, or end quietly when its reader is gone."""

import signal
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """`main` as a process of its own; the exit status is what it returns.

    A character that the terminal lacks becomes `?`. A closed pipe, as of `| head`, ends the process
    without a traceback, and so does Ctrl-C, with status 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        status = main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    sys.exit(status)
