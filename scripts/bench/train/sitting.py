"""A session on one machine: what `scripts.bench.train` has planned is measured and written down."""

import argparse
import itertools
import time
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from scripts.bench import results
from scripts.bench.results import Row
from scripts.bench.stacks.spec import Spec
from scripts.bench.train import rows as train_rows
from scripts.bench.train.process import Process, Task
from scripts.bench.train.rows import TrainingRow
from train.config import ConfigError
from train.metrics.environment import commit

PROCESS_MINUTES = 1.5
"""Minutes to reserve for the first process."""


class Sitting:
    """A session on one machine: starts processes, and records their results."""

    def __init__(self, arguments: argparse.Namespace, content: dict[str, Any], path: Path) -> None:
        """`arguments` are those of scripts.bench.train; `content` is that of the file at `path`."""
        self.arguments, self.content, self.path = arguments, content, path
        self.name = arguments.sitting or continued(content) or f"{datetime.now():%Y-%m-%d %H:%M}"
        self.began = time.monotonic()
        self.longest: float | None = None
        """Seconds of the longest process so far."""
        self.failed: set[tuple[Spec, str, int]] = set()
        """Stack, routing and micro-batch of what failed."""

    def check_lengths(self, specs: Iterable[Spec], routing: str) -> None:
        """Raise ConfigError where a row of this sitting would get windows of another length."""
        arguments = self.arguments
        sizes = arguments.screen if len(arguments.screen) == 1 else None  # or whichever is best
        for spec, row in itertools.product(specs, self.content["rows"]):
            if (
                row["sitting"] != self.name
                or (sizes and row["micro_batch"] not in sizes)
                or not (row["windows"] and train_rows.is_of(row, spec, routing, arguments.gpus))
            ):
                continue
            steps = {len(window["single_step_ms"]) for window in row["windows"]}
            warmup = {row.get("warmup_steps", arguments.warmup)}  # older rows do not say
            for option, asked, before in (
                ("--steps", arguments.steps, steps), ("--warmup", arguments.warmup, warmup),
            ):  # fmt: skip
                if other := before - {asked}:
                    raise ConfigError(
                        f"{option} {asked}: in sitting {self.name}, {self.path} has windows of "
                        f"{spec}, {routing}, micro-batch {row['micro_batch']}, with {option} "
                        f"{min(other)}; give that, or another --sitting"
                    )

    def run(self, tasks: Sequence[Task], rows: list[Row]) -> bool:
        """Each in processes of its own; what they find, into `rows`. Whether there was time."""
        left = deque(tasks)
        started: deque[Process] = deque()  # the one that measures, and the one that waits for it
        try:
            while left or started:
                if self.is_over():
                    return False
                while left and len(started) < 1 + self.arguments.ahead:
                    if not self.has_failed(task := left.popleft()):
                        started.append(Process(task, self.arguments))
                if not started:
                    break
                task = started[0].task
                if self.has_failed(task):  # since this one was started ahead
                    started[0].end()
                else:
                    for one in self.found(*started):
                        self.note(rows, one, task)
                started.popleft()
        finally:
            for process in started:
                process.end()
        return True

    def is_over(self) -> bool:
        """Whether the next process may not end within the minutes."""
        minutes = self.arguments.minutes
        reserve = PROCESS_MINUTES * 60 if self.longest is None else self.longest
        return minutes and time.monotonic() - self.began + reserve > minutes * 60

    def has_failed(self, task: Task) -> bool:
        """Whether it would fail again, as out of memory: at all of its micro-batches."""
        return all((task.spec, task.routing, size) in self.failed for size in task.sizes)

    def found(self, process: Process, ahead: Process | None = None) -> list[dict[str, Any]]:
        """A result a micro-batch, with an error where it has none. `ahead` starts meanwhile."""
        begin = time.monotonic()
        report, ended = process.measure(ahead)
        found = report.pop("results")
        if "machine" in report:
            origin = {name: report[name] for name in ("machine", "versions", "commit")}
            before = self.content["sittings"].setdefault(self.name, {**origin, "boot": boot()})
            if _same(before) != _same(origin):
                raise ConfigError(
                    f"--sitting {self.name} was measured on another machine, by other versions or "
                    "at another commit; give this one another name"
                )
            self.content |= origin
        sizes = [one["micro_batch"] for one in found]
        missing = [size for size in process.task.sizes if size not in sizes]
        found += [{"micro_batch": size, "error": ended} for size in missing[:1]]
        found += [
            {"micro_batch": size, "error": f"not tried: micro-batch {missing[0]} ended the process"}
            for size in missing[1:]
        ]
        self.longest = max(self.longest or 0.0, time.monotonic() - begin)
        return found

    def note(self, rows: list[Row], found: dict[str, Any], task: Task) -> None:
        """What a process found at one micro-batch, into its row; the file is written."""
        key: Row = {
            **task.spec.columns(), "routing": task.routing, "gpus": self.arguments.gpus,
            "micro_batch": found["micro_batch"], "sitting": self.name,
            "version": self.version(task.spec),
        }  # fmt: skip
        about = ("global_batch", "expert_parallel", "warmup_steps", "dispatch", "description")
        key |= {name: found[name] for name in about if name in found}
        row = train_rows.row_of(rows, key)
        if "error" in found:
            row["error"] = found["error"]
            self.failed.add((task.spec, task.routing, found["micro_batch"]))
        else:
            row |= cast(TrainingRow, key)  # one that only failed so far lacks what a result says
            row.pop("error", None)
            device_name = self.content["sittings"][self.name]["machine"]["device_name"]
            train_rows.add(row, found, task.config, device_name)
        results.write_json(self.path, self.content)

    def version(self, spec: Spec) -> str | None:
        """The version of the stack."""
        origin = self.content["sittings"].get(self.name, {})
        if spec.stack == "ours":
            return origin.get("commit")
        return origin.get("versions", {}).get("megatron-core")


def _same(origin: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a sitting share: the machine, whatever part of it they take."""
    machine = {name: value for name, value in origin["machine"].items() if name != "devices"}
    return {"machine": machine, "versions": origin["versions"], "commit": origin["commit"]}


def continued(content: dict[str, Any]) -> str | None:
    """The file's last sitting, if it is of this machine since its start, and at this commit."""
    if not content["sittings"] or (now := boot()) is None:
        return None
    name, last = next(reversed(content["sittings"].items()))
    return name if (last.get("boot"), last["commit"]) == (now, commit()) else None


def boot() -> str | None:
    """What Linux calls the time since this machine was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
