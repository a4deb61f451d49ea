"""How a training ends before its last step, each as one line and an exit code of its own."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Those that ask a training to stop."""

STOP_FILE = "TRAIN_STOP_FILE"
"""A variable that names a file for whoever starts the training and can neither signal its ranks nor
see their exit codes, such as a batch script around torchrun. Where the file appears the training
stops as after a signal; whatever made it stop, once it has saved it writes `saved` into the file,
which says: requeue me. While the file is there, nothing starts."""


class TrainingFailed(Exception):
    """It cannot go on. The text is the one line to print: what, where, what would do."""

    exit_code = 1


class Preempted(TrainingFailed):
    """Somebody asked it to stop; everything up to here is saved."""

    exit_code = REQUEUE


def stop_file() -> Path | None:
    """The file that TRAIN_STOP_FILE names, there or not."""
    path = os.environ.get(STOP_FILE)
    return Path(path) if path else None


def ignore_in_worker() -> None:
    """For a data worker: its training stops it in good time, and a signal to all processes of a
    job must not take the data away from the step that is to be ended."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run_process(main: Callable[[], int | None]) -> None:
    """`main` as a process: the exit code is what it returns, and 1 after an error."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # A failed rank must not wait for communication that will never come.
        os._exit(code)
