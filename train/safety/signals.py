"""A signal asks the run to stop: it ends the step, saves, and exits with REQUEUE.

    with StopRequest(ranks) as stop:
        for ...:
            ...                      # a step
            if stop.agreed(): ...    # save and leave

SIGTERM, SIGHUP (the terminal is closed), SIGUSR1, SIGUSR2, SIGXCPU (a limit on CPU time) and Ctrl-C
ask so, on any rank. A second signal exits at once. The file that TRAIN_STOP_FILE names asks too;
see train/failure.py.
"""

import logging
import os
import signal
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from train.failure import SIGNALS, STOP_FILE, stop_file
from train.parallel import Ranks
from train.safety import output

log = logging.getLogger(__name__)

BY_FILE = 1000
"""In place of a signal's number."""

ONE_REQUEST_S = 1.0
"""Signals this close together are one request: a batch system may signal all processes of a job,
and torchrun then passes on its own."""


class StopRequest:
    """Listens while it is open, and has all ranks stop after the same step."""

    def __init__(self, ranks: Ranks, timeout_s: int) -> None:
        self.ranks = ranks
        self._asked = 0  # by a signal of this number
        # Signals reach ranks at different moments, so they ask each other after every step: on the
        # CPU, because a GPU would have to be waited for.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.file = stop_file() if ranks.is_first else None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python runs a handler only when its main thread returns to Python; a thread that reads the
        # signals' numbers also runs while the main thread waits for another rank.
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # Under nohup the run ignores SIGHUP, on purpose.
        ours = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, _nothing) for number in ours}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)  # ends the thread

    def agreed(self) -> str | None:
        """What asked some rank to stop, such as SIGTERM. Every rank calls it after every step."""
        asked = self._asked
        if not asked and self.file is not None and self.file.exists():
            asked = BY_FILE
        highest = torch.tensor(asked, dtype=torch.int32)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        asked = int(highest)
        return STOP_FILE if asked == BY_FILE else signal.Signals(asked).name if asked else None

    def answer(self) -> None:
        """Write into the stop file that all is saved."""
        if self.file is not None:
            try:
                self.file.write_text("saved\n")
            except OSError as error:  # all is saved; only the caller is not told
                log.warning("%s cannot be written (%s)", self.file, error.strerror)

    def wait_for_all(self) -> None:
        """Return when every rank has called it."""
        dist.barrier(group=self.group)

    def _listen(self) -> None:
        first: float | None = None
        while received := os.read(self._read, 1):
            if received[0] not in SIGNALS:
                continue
            name = signal.Signals(received[0]).name
            if first is None:
                first, self._asked = time.monotonic(), received[0]
            elif received[0] == signal.SIGXCPU:
                pass  # the system repeats it every second
            elif time.monotonic() - first > ONE_REQUEST_S:
                output.last_words(f"a second signal, {name}: leaving at once")
                os._exit(128 + received[0])
        os.close(self._read)


def _nothing(*_: object) -> None:
    """Replaces the signal's default action."""
