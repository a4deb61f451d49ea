"""What the JSON files in `docs/results/` have in common, without an import that takes time."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

Row = dict[str, Any]
"""One of a file's `rows`. Which keys it has, the benchmark that wrote it says."""


class Spread(TypedDict):
    """One figure over its repeats."""

    median: float
    min: float
    max: float


class Origin(TypedDict):
    """What figures depend on, beside the config."""

    machine: dict[str, str | float] | str
    versions: NotRequired[dict[str, str]]
    commit: str | None


class Result(Origin):
    """A file's content."""

    config: NotRequired[dict[str, Any]]
    bench: NotRequired[dict[str, int]]  # of training steps
    rows: list[Row]


def spread(values: Sequence[float]) -> Spread:
    """`median`, `min` and `max` of one figure over its repeats. Raises StatisticsError if empty."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` at once, so that a crash leaves the old file or the new. NaN is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    new.replace(path)
