"""Data workers, the processes that read ahead: they live exactly as long as training runs.

A signal to all processes of a job must not take the data away from the step that is being finished,
so workers ignore those that ask a run to stop. PyTorch ends its workers by one of these, and waits
for what they read; here they are killed instead, which loses nothing.
"""

import multiprocessing
import os
import signal
from multiprocessing.queues import Queue

from train.failure import SIGNALS
from train.safety import output
from train.safety.parent import end_with_parent

_ended: list[object] = []


def begin() -> None:
    """Set up a worker before it reads anything."""
    end_with_parent(signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # By default it prints a traceback and drops the batch, for which training then waits.
    Queue._on_queue_feeder_error = staticmethod(_cannot_hand_over)  # type: ignore[attr-defined]


def _cannot_hand_over(error: Exception, batch: object) -> None:
    reason = " ".join(str(error).split())
    output.last_words(f"WARNING: a data worker cannot hand over a batch ({reason})")
    os._exit(1)  # PyTorch notices that at once


def end(batches: object) -> None:
    """End this rank's workers when training is over, whatever they are reading."""
    # PyTorch's own clean-up would take locks with which a worker may have been killed.
    _ended.append(batches)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch's handler sees a fault
    for worker in multiprocessing.active_children():
        worker.kill()
