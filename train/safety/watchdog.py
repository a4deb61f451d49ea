"""Ends a run that hangs, and names the ranks that the others wait for.

A collective waits for every rank. If one never comes, because it is stuck, stopped or gone, the
others wait silently, and their time-out names who waited, not who was missing. Here a thread on
every rank watches for signs of life. After `timeout_s` without any, it writes down where its rank
is, in `runs/<name>/stalled/`, then reads what the others wrote, and one rank reports it all in one
line. It works alike for gloo and NCCL, since it uses neither.

A rank that hangs in C code may hold Python's global lock, and then no thread of it runs. So two
timers that need no lock are always set, a little later: faulthandler's writes the stack down, and
the system's, SIGALRM, ends the process.
"""

import faulthandler
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from train.safety import output

MARGIN_S = 60
"""The process groups' own time-outs come this much later, so that they do not report first."""

GRACE_S = 2.0
"""How much later than this thread faulthandler writes, where the thread does not run."""

GATHER_S = 5.0
"""How long ranks may take to write down where they are, the clocks of nodes and a shared file
system included."""

END_S = 15.0
"""How much later SIGALRM comes: when all others have read and spoken, since they would take the end
of this one for the fault."""

ROOT = f"{Path(__file__).parents[2]}{os.sep}"
TORCH_DISTRIBUTED = os.path.dirname(dist.__file__)


class Watchdog:
    """One rank's. `beat` at least once in `timeout_s`; close it when the steps are over."""

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int,
        timeout_s: float,
        on_hang: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_hang` is called when the watchdog is about to end this rank."""
        self.on_hang = on_hang
        self.folder = run_dir / "stalled"
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._setting_timers = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:  # of an earlier start with more ranks
            for path in set(self.folder.iterdir()) - set(map(self._path_of, range(world_size))):
                path.unlink()
        # Open from now on: faulthandler cannot open a file.
        self._file = self._path_of(rank).open("w")
        self._file.write(f"{socket.gethostname()}\n")
        self._file.flush()
        # Before SIGALRM ends this process its stack is on the terminal: no other thread may print.
        where = output.stderr_descriptor()
        faulthandler.register(signal.SIGALRM, file=where, all_threads=False, chain=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Note that this rank is alive."""
        self._last = time.monotonic()

    def close(self) -> None:
        """The steps are over, successfully or not."""
        with self._setting_timers:
            self._closed.set()
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)
        with suppress(OSError):
            own = self._path_of(self.rank)
            if position(own.read_text()) is None:
                own.unlink()
            self.folder.rmdir()  # the last one can

    def _watch(self) -> None:
        while True:
            left = self._last + self.timeout_s - time.monotonic()
            if left < 0:
                self._report()
                return
            self._set_timers(left + GRACE_S, left + END_S)
            if self._closed.wait(min(1.0, self.timeout_s / 10)):
                return

    def _set_timers(self, until_stack_s: float, until_end_s: float) -> None:
        with self._setting_timers:
            if not self._closed.is_set():
                faulthandler.dump_traceback_later(until_stack_s, file=self._file)
                signal.setitimer(signal.ITIMER_REAL, until_end_s)

    def _report(self) -> None:
        gather_s = GRACE_S + GATHER_S
        self.on_hang()
        # Out of the way, but set: the main thread can still come back and take the lock.
        self._set_timers(3 * gather_s, 4 * gather_s)
        faulthandler.dump_traceback(self._file)
        with suppress(OSError):  # a full disk must not keep this process
            os.fsync(self._file.fileno())  # for readers on other nodes
        time.sleep(gather_s)
        if self._closed.is_set():
            return
        present = self._present()
        speakers = (rank for rank, where in present.items() if where.can_speak)
        if self.rank == min(speakers, default=self.rank):
            line = summary(present, self.world_size, self.timeout_s)
            output.last_words(f"error: {line}; stacks are in {self.folder}")
        else:
            # The rank that reports may have started later, and would take this one's end for the
            # fault.
            time.sleep(gather_s)
        # No clean-up: whatever this process waits for will not come.
        os._exit(1)

    def _present(self) -> "dict[int, Position]":
        """Positions of the ranks that wrote down where they are."""
        found = {}
        for rank in range(self.world_size):
            with suppress(OSError):
                where = position(self._path_of(rank).read_text())
                if where is not None:
                    found[rank] = where
        return found

    def _path_of(self, rank: int) -> Path:
        """Holds the rank's host in the first line, and below it what faulthandler writes."""
        return self.folder / f"rank_{rank:05d}.txt"


class Position(NamedTuple):
    """Where a hanging rank is."""

    place: str
    """File and line of our code."""
    waits: bool
    """Whether that called torch.distributed, which has not come back."""
    host: str
    can_speak: bool
    """Whether its watchdog's thread runs; otherwise the rank holds Python's lock."""


def position(text: str) -> Position | None:
    """Read a rank's file in `stalled/`; None where only the host has been written."""
    host, _, stacks = text.partition("\n")
    # The newest thread comes first and its last call on top, so that the main thread is the last.
    main_thread = re.split(r"^(?:Current thread|Thread) 0x.*$", stacks, flags=re.MULTILINE)[-1]
    frames = re.findall(r'^  File "(.*)", line (\d+) in ', main_thread, flags=re.MULTILINE)
    if not frames:
        return None
    files = [file for file, _ in frames]
    ours = (n for n, file in enumerate(files) if file.startswith(ROOT) and not _installed(file))
    last = next(ours, 0)
    return Position(
        place=":".join(frames[last]).removeprefix(ROOT),
        waits=any(file.startswith(TORCH_DISTRIBUTED) for file in files[:last]),
        host=host,
        can_speak="Current thread 0x" in stacks,
    )


def _installed(file: str) -> bool:
    return "site-packages" in file


def summary(present: dict[int, Position], world_size: int, timeout_s: float) -> str:
    """One line, from the places that the ranks wrote down."""
    parts = []
    silent = [rank for rank in range(world_size) if rank not in present]
    if silent:
        parts.append(f"{_ranks(silent)} did not come and gives no sign of life")
    waiting: dict[str, list[int]] = {}
    elsewhere: dict[str, list[int]] = {}
    for rank, where in present.items():
        if where.waits:
            waiting.setdefault(where.place, []).append(rank)
        else:
            elsewhere.setdefault(f"{where.place} on {where.host}", []).append(rank)
    # On a GPU no rank need be in a collective: the host waits where it reads a result.
    verb = "did not come, being at" if waiting else "is at"
    parts += [f"{_ranks(ranks)} {verb} {place}" for place, ranks in elsewhere.items()]
    parts += [f"{_ranks(ranks)} waits at {place}" for place, ranks in waiting.items()]
    return f"nothing moved for parallel.timeout_s={timeout_s:g}: {'; '.join(parts)}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
