"""Finished runs: reads their folders, and computes their figures."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from train.config import Config, ConfigError, load

TAIL = 0.1
"""Share of the logged steps, at the end, over which a "final" loss is averaged: one step's loss
depends mostly on its batch."""

EQUAL_BY_DESIGN = ("moe.path", "run.", "tracking.")
"""Config keys in which fairly compared runs may differ."""


T = TypeVar("T")

METRICS_FILE = "metrics.jsonl"
ROUTING_FILE = "routing.jsonl"


class InputError(Exception):
    """Bad input from the user; its text is the one line to print."""


@dataclass(frozen=True)
class Run:
    """One run's folder, read."""

    name: str
    config: Config
    rows: list[dict[str, Any]]
    """Lines of metrics.jsonl, in order."""
    environment: dict[str, Any] = field(default_factory=dict)
    """environment.json: device, device_name, world_size, versions, commit; empty if absent."""
    folder: Path = Path()
    changes: list[tuple[int, dict[str, tuple[Any, Any]]]] = field(default_factory=list)
    """changes.jsonl: from which step on a key had another value, and which before and since."""

    @property
    def path(self) -> str:
        return self.config.moe.path

    @property
    def device(self) -> str | None:
        """`cpu`, `cuda`, or None when the folder does not say."""
        named = self.config.train.device
        return self.environment.get("device") or (None if named == "auto" else named)

    @property
    def computed_in(self) -> str:
        """The dtype of the computation, `fp32` or `bf16`, whatever the path is called.

        On a CPU FP8 is emulated in it.
        """
        if self.config.train.dtype != "auto":
            return self.config.train.dtype
        return {"cpu": "fp32", "cuda": "bf16"}.get(self.device or "", "not known")

    @property
    def machine(self) -> str:
        name = self.environment.get("device_name") or self.device or "unknown device"
        ranks = self.environment.get("world_size")
        return f"{ranks} x {name}" if ranks else str(name)

    def series(self, metric: str) -> dict[int, float]:
        """Value by step, where the metric was logged; NaN where it was not finite."""
        return {
            row["progress/step"]: math.nan if row[metric] is None else float(row[metric])
            for row in self.rows
            if metric in row
        }

    def finite(self, metric: str) -> list[float]:
        """The metric's values in the order of steps, without those that are not finite."""
        return [value for value in self.series(metric).values() if math.isfinite(value)]

    def tokens(self, steps: Sequence[int]) -> list[float]:
        seen = self.series("progress/tokens")
        return [seen.get(step, math.nan) for step in steps]


def read_run(folder: Path) -> Run:
    """Raises InputError if the folder does not hold a run with at least one logged step."""
    if not folder.is_dir():
        raise InputError(f"no run folder {folder}")
    try:
        config = load(folder / "config.yaml")
    except ConfigError as error:
        raise InputError(f"{folder} is not a run: {error}") from None
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{folder}/metrics.jsonl: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{folder}/metrics.jsonl is not text") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not _is_row(row):
                raise ValueError
        except ValueError:
            if number == len(lines):
                break  # being written right now, or cut off by a crash
            raise InputError(
                f"{folder}/metrics.jsonl line {number} is not a row of metrics"
            ) from None
        rows.append(row)
    if not rows:
        raise InputError(f"{folder}/metrics.jsonl has no logged step yet")
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    if not isinstance(environment, dict):
        environment = {}
    return Run(folder.resolve().name, config, rows, environment, folder, _changes(folder))


def _changes(folder: Path) -> list[tuple[int, dict[str, tuple[Any, Any]]]]:
    """Empty where nothing has changed, and of lines that cannot be read."""
    found = []
    try:
        for line in (folder / "changes.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            keys = {key: (before, now) for key, (before, now) in row["changed"].items()}
            found.append((int(row["progress/step"]), keys))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return found


def _is_row(row: object) -> bool:
    """Numbers by metric, None for one that was not finite."""
    return (
        isinstance(row, dict)
        and type(row.get("progress/step")) is int
        and all(value is None or isinstance(value, int | float) for value in row.values())
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read all; runs that share a name are named by the folder as it was given."""
    for index, folder in enumerate(folders):  # else it would be a repeat of itself
        for earlier in folders[:index]:
            if folder.resolve() == earlier.resolve():
                raise InputError(f"{earlier} and {folder} are one run; give it once")
    return _named_apart([read_run(folder) for folder in folders])


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    names = [run.name for run in runs]
    return [
        replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs
    ]


def find_group(parent: Path, group: str) -> list[Run]:
    """The runs below `parent` whose `run.group` is `group`, oldest first; perhaps none.

    Folders without a readable run are skipped: a run that is starting has no metrics yet.
    """
    folders = sorted(
        (path.parent for path in parent.glob("**/metrics.jsonl")),
        key=lambda folder: (folder / "metrics.jsonl").stat().st_mtime,
    )
    found = []
    for folder in folders:
        try:
            run = read_run(folder)
        except InputError:
            continue
        if run.config.run.group == group:
            found.append(run)
    return _named_apart(found)


def choose_baseline(runs: Sequence[Run], name: str | None) -> Run:
    """The run of that name or path; by default the first bf16 run, or else the first run."""
    if name is None:
        return next((run for run in runs if run.path == "bf16"), runs[0])
    for run in runs:
        if run.name == name:
            return run
    for run in runs:
        if run.path == name:
            return run
    raise InputError(f"--baseline {name} is none of the runs: {', '.join(r.name for r in runs)}")


def tail(values: Sequence[T]) -> Sequence[T]:
    """The last tenth, and at least one."""
    return values[-max(1, math.ceil(len(values) * TAIL)) :]


def common_losses(run: Run, baseline: Run) -> list[tuple[int, float, float]]:
    """Step, loss and the baseline's loss, at the steps that both have logged."""
    ours, theirs = run.series("loss/train"), baseline.series("loss/train")
    return [(step, ours[step], theirs[step]) for step in ours if step in theirs]


def loss_gap(run: Run, baseline: Run) -> float | None:
    """(loss - baseline's) / baseline's in percent: means over the last tenth of common steps."""
    pairs = tail(common_losses(run, baseline))
    if run is baseline or not pairs:
        return None
    ours, theirs = (statistics.fmean(pair[i] for pair in pairs) for i in (1, 2))
    return (ours - theirs) / theirs * 100


def median(metric: str) -> Callable[[Run], float | None]:
    def value(run: Run) -> float | None:
        values = run.finite(metric)
        return statistics.median(values) if values else None

    return value


def mean(metric: str) -> Callable[[Run], float | None]:
    def value(run: Run) -> float | None:
        values = run.finite(metric)
        return statistics.fmean(values) if values else None

    return value


def largest(metric: str) -> Callable[[Run], float | None]:
    return lambda run: max(run.series(metric).values(), default=None)


def total(metric: str) -> Callable[[Run], float | None]:
    def summed(run: Run) -> float | None:
        values = run.series(metric).values()
        return sum(values) if values else None

    return summed


def last(metric: str) -> Callable[[Run], float | None]:
    return lambda run: next(reversed(run.series(metric).values()), None)


def final(metric: str) -> Callable[[Run], float | None]:
    """Its mean over the last tenth of the logged steps."""

    def value(run: Run) -> float | None:
        values = list(run.series(metric).values())
        return statistics.fmean(tail(values)) if values else None

    return value


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """All keys in which the runs differ, with each run's value."""
    flat = [flatten(run.config.model_dump(mode="json")) for run in runs]
    return [
        (key, [str(one[key]) for one in flat])
        for key in flat[0]
        if any(one[key] != flat[0][key] for one in flat)
    ]


def environment_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What of machine, versions and commit differs, with each run's value."""
    described = []
    for run in runs:
        versions = run.environment.get("versions")
        described.append(
            {
                "machine": run.machine,
                "commit": str(run.environment.get("commit") or "not known"),
                **(versions if isinstance(versions, dict) else {}),
            }
        )
    keys = list(dict.fromkeys(key for one in described for key in one))
    return [
        (key, [str(one.get(key, "not known")) for one in described])
        for key in keys
        if len({one.get(key) for one in described}) > 1
    ]


STEP_TOTALS = ("time/step_ms", "time/data_ms", "time/profiled_step_ms")


def profiled_rows(run: Run) -> tuple[list[dict[str, float]], int]:
    """Milliseconds by part of the profiled steps that count, and how many there are in all.

    Those that count are the middle half by length: a stall of one step, of a few that are
    profiled, would be most of a bar.
    """
    found = [
        {
            name: value
            for name, value in row.items()
            if name.startswith("time/") and name.endswith("_ms") and name not in STEP_TOTALS
            if value is not None and math.isfinite(value)
        }
        for row in run.rows
        if "time/other_ms" in row
    ]
    rows = sorted(found, key=lambda row: sum(row.values()))
    apart = len(rows) // 4
    return rows[apart : len(rows) - apart], len(rows)


def step_parts(run: Run) -> dict[str, float]:
    """Milliseconds of each part of a profiled step; empty without any.

    Means, not medians: so the parts add up to the step.
    """
    rows, _ = profiled_rows(run)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: statistics.fmean(row.get(name, 0.0) for row in rows) for name in names}


def expert_load(run: Run) -> tuple[int, list[list[float]]] | None:
    """Step and load [layers][experts] of the last line of `routing.jsonl`; None without one."""
    try:
        lines = (run.folder / ROUTING_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
            load = [[float(value) for value in layer] for layer in row["moe/expert_load"]]
            step = int(row["progress/step"])
        except (ValueError, KeyError, TypeError):
            continue  # half a line of a run that was killed
        if load and all(layer and all(map(math.isfinite, layer)) for layer in load):
            return step, load
    return None


def flatten(sections: dict[str, dict[str, T]]) -> dict[str, T]:
    return {f"{name}.{key}": v for name, keys in sections.items() for key, v in keys.items()}
