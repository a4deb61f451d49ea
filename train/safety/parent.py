"""A process that must not outlive the one that started it, however that ended.

After a `kill -9` of torchrun its ranks would continue on GPUs that are believed to be free; and a
rank's data workers would hold its connections open, whose end tells the others.
"""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """Have the system send this process signal `number` when its parent ends. Linux only."""
    before = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != before:  # it ended meanwhile
        os.kill(os.getpid(), number)


def end_with_torchrun() -> None:
    """Have this rank get SIGTERM, on which it saves, when torchrun ends. Does nothing without
    torchrun: a run outlives the shell that started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)
