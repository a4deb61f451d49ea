"""Ends a training that hangs, and names the ranks that the others wait for.

A collective waits for every rank. Where one never comes, because it is stuck, stopped or gone, the
others wait in silence, and a time-out of theirs says who waited, not who was missing. Here a thread
on every rank watches for signs of life. Where there is none for `timeout_s`, it writes down where
its rank is, in `runs/<name>/stalled/`, then looks who did the same, and one rank says it all in one
line. It works alike for gloo and NCCL, since it asks neither.
"""

import os
import shutil
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as dist

MARGIN_S = 60
"""The process groups' own time-outs come this much later, so that they do not speak first."""

GATHER_S = 5.0
"""How long ranks may take to write down where they are, the clocks of nodes and a shared file
system included."""

TORCH_DISTRIBUTED = os.path.dirname(dist.__file__)


class Watchdog:
    """One rank's. `beat` at least once in `timeout_s`; close it when the steps are over."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, timeout_s: float) -> None:
        self.folder = run_dir / "stalled"
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._main = threading.main_thread().ident
        if rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """This rank is alive and about to do the next thing."""
        self._last = time.monotonic()

    def close(self) -> None:
        """The steps are over, well or badly."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.timeout_s / 10)):
            if time.monotonic() - self._last > self.timeout_s:
                self._report()
                return

    def _report(self) -> None:
        waits, where, stack = self._position()
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.folder / f"rank_{self.rank:05d}.txt"
        new = own.with_suffix(".tmp")
        head = f"{'waits' if waits else 'is'}\n{where}\n{socket.gethostname()}\n"
        new.write_text(f"{head}\n{stack}")
        new.replace(own)
        time.sleep(GATHER_S)
        if self._closed.is_set():
            return
        present = {}
        for path in sorted(self.folder.glob("rank_*.txt")):
            present[int(path.stem.removeprefix("rank_"))] = path.read_text().splitlines()[:3]
        if self.rank == min(present):
            line = summary(present, self.world_size, self.timeout_s)
            print(f"error: {line}; stacks are in {self.folder}", file=sys.stderr, flush=True)
        else:
            # The one that speaks may have begun later, and would take this one's end for the fault.
            time.sleep(GATHER_S)
        # No clean-up: whatever this process waits for will not come.
        os._exit(1)

    def _position(self) -> tuple[bool, str, str]:
        """Whether our code waits in torch.distributed, where our code is, and the whole stack."""
        frames = traceback.extract_stack(sys._current_frames()[self._main or 0])
        root = f"{Path(__file__).parents[2]}{os.sep}"
        ours = [
            number
            for number, frame in enumerate(frames)
            if frame.filename.startswith(root) and "site-packages" not in frame.filename
        ]
        last = ours[-1] if ours else len(frames) - 1
        waits = any(frame.filename.startswith(TORCH_DISTRIBUTED) for frame in frames[last + 1 :])
        place = f"{frames[last].filename.removeprefix(root)}:{frames[last].lineno}"
        return waits, place, "".join(traceback.format_list(frames))


def summary(present: dict[int, list[str]], world_size: int, timeout_s: float) -> str:
    """One line, from `[waits or is, place, host]` of the ranks that wrote it down."""
    parts = []
    silent = [rank for rank in range(world_size) if rank not in present]
    if silent:
        parts.append(f"{_ranks(silent)} did not come and gives no sign of life")
    waiting: dict[str, list[int]] = {}
    elsewhere: dict[str, list[int]] = {}
    for rank, (state, place, host) in present.items():
        if state == "waits":
            waiting.setdefault(place, []).append(rank)
        else:
            elsewhere.setdefault(f"{place} on {host}", []).append(rank)
    # On a GPU nobody needs to be in a collective: the host waits where it reads a result.
    verb = "did not come, being at" if waiting else "is at"
    parts += [f"{_ranks(ranks)} {verb} {place}" for place, ranks in elsewhere.items()]
    parts += [f"{_ranks(ranks)} waits at {place}" for place, ranks in waiting.items()]
    return f"nothing moved for parallel.timeout_s={timeout_s:g}: {'; '.join(parts)}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
