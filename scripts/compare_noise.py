"""Is a difference in speed larger than the noise? A bootstrap of the ratio of medians.

The measurements are logging intervals. Neighbours share a cause, such as a clock that falls, so
they are not independent; resampling takes blocks of neighbours together. Where a path was run more
than once, whole runs are drawn first and blocks within each after that, because two runs of one
path differ by more than the intervals of one run show.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
DIGITS = 3
"""To which ratios are shown, so that what is shown and the verdict never disagree."""

FEWEST = 5
"""Intervals of a run below which nothing is said: the ends of their range mean little."""


@dataclass(frozen=True)
class Ratio:
    """How many times the baseline's something is, with the interval of CONFIDENCE around it."""

    value: float
    low: float
    high: float
    repeats: int
    """Runs on the side that has fewer."""
    intervals: int
    """Logging intervals in the run that has the fewest."""

    @property
    def verdict(self) -> Literal["higher", "lower", "noise", "unknown"]:
        """`noise` where the interval holds 1, so that "no difference" explains the data too."""
        if self.intervals < FEWEST:
            return "unknown"
        if round(self.low, DIGITS) <= 1 <= round(self.high, DIGITS):
            return "noise"
        return "higher" if self.value > 1 else "lower"


def centre(runs: Sequence[Sequence[float]]) -> float:
    """The median of the runs' medians."""
    return float(np.median([np.median(values) for values in runs]))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The middle half of the values lies between these."""
    low, high = np.percentile(values, [25, 75])
    return float(low), float(high)


def compare(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Ratio | None:
    """The ratio of two sides, each a list of runs, each a list of measurements in order.

    None if a side has no measurement. The same input gives the same answer.
    """
    ours, theirs = ([run for run in side if len(run)] for side in (ours, theirs))
    if not ours or not theirs:
        return None
    generator = np.random.default_rng(0)
    ratios = _resample(ours, generator) / _resample(theirs, generator)
    outside = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(ratios, [outside, 100 - outside])
    return Ratio(
        centre(ours) / centre(theirs),
        float(low),
        float(high),
        min(len(ours), len(theirs)),
        min(len(run) for run in (*ours, *theirs)),
    )


def _resample(runs: Sequence[Sequence[float]], generator: np.random.Generator) -> np.ndarray:
    """The centre of each of RESAMPLES redrawn sides, float64 [RESAMPLES]."""
    medians = np.stack([_resample_run(np.asarray(run, float), generator) for run in runs])
    drawn = generator.integers(len(runs), size=(len(runs), RESAMPLES))
    return np.median(np.take_along_axis(medians, drawn, axis=0), axis=0)


def _resample_run(run: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Medians of one run, redrawn in blocks of neighbours; float64 [RESAMPLES]."""
    return np.concatenate([np.median(drawn, axis=1) for drawn in _redraw(run, generator)])


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval of CONFIDENCE around the mean of measurements in order."""
    generator = np.random.default_rng(0)
    means = np.concatenate([d.mean(axis=1) for d in _redraw(np.asarray(values, float), generator)])
    outside = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(means, [outside, 100 - outside])
    return float(low), float(high)


def _redraw(values: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """RESAMPLES samples of the same size, some at a time; blocks wrap around at the end."""
    count = len(values)
    block = max(1, round(count ** (1 / 3)))  # grows as theory has it, and slowly
    blocks = math.ceil(count / block)
    chunk = 100
    for _ in range(0, RESAMPLES, chunk):
        starts = generator.integers(count, size=(chunk, blocks, 1))
        places = (starts + np.arange(block)).reshape(chunk, -1)[:, :count]
        yield values[places % count]
