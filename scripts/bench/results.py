"""What the JSON files in `docs/results/` have in common, without slow imports."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from train.whole_file import whole

Row = dict[str, Any]
"""One of a file's `rows`. Its keys are defined by the benchmark that wrote it."""


class Spread(TypedDict):
    """One figure over its repeats."""

    median: float
    min: float
    max: float


class Origin(TypedDict):
    """What figures depend on, in addition to the config."""

    machine: dict[str, str | float] | str
    versions: NotRequired[dict[str, str]]
    commit: str | None


class Result(Origin):
    """A file's content. Where it has `sittings`, its own origin is that of the last one."""

    config: NotRequired[dict[str, Any]]
    bench: NotRequired[dict[str, int]]
    """Of training steps: how the sitting that began the file was asked to measure."""
    sittings: NotRequired[dict[str, Origin]]
    """Of training steps: where each was, by the name that rows give."""
    screening: NotRequired[list[Row]]
    """Of training steps: one short window each, which chose the micro-batches of `rows`."""
    rows: list[Row]


def rows_to_show(result: Result) -> list[Row]:
    """Its rows; of training steps the screening, as long as nothing has been repeated."""
    return result["rows"] or result.get("screening", [])


def spread(values: Sequence[float]) -> Spread:
    """`median`, `min` and `max` of one figure over its repeats. Raises StatisticsError if empty."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Interval(TypedDict):
    """A mean, and how far from it the true one may be with 95% confidence (Student's t)."""

    mean: float
    plus_minus: float


STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
             2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
             2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
"""97.5% quantiles of Student's t for 1 to 30 degrees of freedom; beyond, 2.042 is a little wide."""


def student_t(freedom: float) -> float:
    """The quantile for an interval of 95%; between two degrees of freedom the wider one."""
    return STUDENT_T[min(max(int(freedom), 1), len(STUDENT_T)) - 1]


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent repeats and its 95% interval. Raises StatisticsError below two."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "plus_minus": student_t(len(values) - 1) * error}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` atomically, so that a crash leaves the old file or the new. NaN is an
    error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with whole(path) as new:
        new.write_text(text)
