"""One process a GPU that measures a stack, started by `scripts.bench.train`."""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.measure import first_failure, waiting
from scripts.bench.stacks.spec import Spec
from train.config import Config
from train.safety.parent import end_with_parent

MEASURE = "scripts.bench.measure"
POLL_S = 1.0
GRACE_S = 15.0
"""How long the ranks have to agree, or to end, once one has failed: inside a kernel of DeepEP the
others would wait longer, and for nothing."""
ENDING_S = 20.0
"""How long a process may take to end once all is measured: NCCL can wait forever for a CUDA graph
that somebody still holds."""
LOADING_S = 90.0
"""How long a process waits with its timing for the one that was started ahead to load."""
PATIENCE_S = 40
"""How long torchrun has to end its ranks: it kills those that ignore its signal after 30 s."""


@dataclass(frozen=True)
class Task:
    """What a process measures."""

    spec: Spec
    routing: str
    config: Config
    """The stack's, at any micro-batch: a row's FLOPs and tokens are counted from it."""
    sizes: tuple[int, ...]
    """Micro-batches, one after the other."""
    steps: int
    """Timed steps at each."""
    warmup: int
    """Steps before them."""


class Process:
    """`scripts.bench.measure` with a process for each GPU, which waits until it is asked."""

    def __init__(self, task: Task, arguments: argparse.Namespace) -> None:
        """`arguments` are those of scripts.bench.train."""
        self.task = task
        self._folder = Path(tempfile.mkdtemp())
        self._out, self._go = self._folder / "measured.json", self._folder / "go"
        self._quiet = self._folder / "quiet"
        self._failure = self._folder / "failure"
        self._lock = waiting.hold(self._folder)
        self._minutes, self._ranks = arguments.process_minutes, arguments.gpus
        command = [
            sys.executable, "-m", "scripts.bench.torchrun", "--standalone",
            "--nproc-per-node", str(arguments.gpus), "-m", MEASURE,
            arguments.config, str(task.spec), "--micro-batches", ",".join(map(str, task.sizes)),
            "--routing", task.routing, "--steps", str(task.steps), "--warmup", str(task.warmup),
            "--out", str(self._out), "--wait-for", str(self._go),
            "--quiet", str(self._quiet), "--failure", str(self._failure), *arguments.overrides,
        ]  # fmt: skip
        environment = {"OMP_NUM_THREADS": "8", **os.environ, **task.spec.environment}
        self._process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the plan, which then ends this
            preexec_fn=lambda: end_with_parent(signal.SIGTERM),
        )

    def is_loaded(self) -> bool:
        """Whether it no longer loads libraries: it waits, measures or has ended."""
        return waiting.have_loaded(self._folder) == self._ranks or self._process.poll() is not None

    def measure(self, ahead: "Process | None" = None) -> tuple[dict[str, Any], str]:
        """What it writes, with `results`, and why it has no more: the line of the rank that failed
        first, or how the process ended.

        ahead: one that was started ahead. Nothing is timed while that loads, which takes from the
        host what a stack that waits for its host needs; for `LOADING_S` at most.
        """
        _tell(self._go)
        try:
            ended = self._wait(ahead)
            ended = first_failure.read(self._failure) or ended
        finally:
            report = self._report()
            self.end()
        return report, ended

    def _report(self) -> dict[str, Any]:
        """What it has written so far."""
        report: dict[str, Any] = {"results": []}
        if self._out.exists():
            report = json.loads(self._out.read_text())
        return report

    def _wait(self, ahead: "Process | None") -> str:
        """Return how it ended, or that it did not: in its minutes, or soon after a rank failed or
        all was measured."""
        patient_until = time.monotonic() + LOADING_S
        deadline = math.inf  # its minutes begin when steps may be timed
        failed: float | None = None
        measured: float | None = None
        while (now := time.monotonic()) < deadline:
            if deadline == math.inf and (ahead is None or ahead.is_loaded() or now > patient_until):
                deadline = now + self._minutes * 60
                _tell(self._quiet)
            with suppress(subprocess.TimeoutExpired):
                return f"process ended: exit code {self._process.wait(POLL_S)}"
            if measured is None and len(self._report()["results"]) == len(self.task.sizes):
                measured = now
            if measured is not None and now - measured > ENDING_S:
                ended = f"ended: all was measured, and it was there {ENDING_S:.0f} s later"
                print(f"{self.task.spec}: {ended}", flush=True)
                return f"process {ended}"
            if not self._failure.exists():
                failed = None
            elif failed is None:
                failed = now
            elif now - failed > GRACE_S:
                return f"process ended: a rank failed, and the others did not in {GRACE_S:.0f} s"
        return f"process ended: not done after {self._minutes} minutes"

    def end(self) -> None:
        """Whatever of it is still there: a rank that hangs keeps its GPU's memory.

        Asks torchrun first: its ranks are in sessions of their own, and those that still load
        their libraries outlive a torchrun that is killed. A second time does nothing.
        """
        self._process.terminate()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()


def _tell(file: Path) -> None:
    """Ranks wait for `file`, and end where its folder has been removed."""
    with suppress(OSError):
        file.touch()
