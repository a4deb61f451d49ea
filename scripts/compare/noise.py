"""Is a difference larger than the noise? An interval around it, by what was measured.

Speeds are measured by logging intervals. Where both sides were run more than once, a run is one
observation, its median: two runs of one path differ by more than the intervals of one run show.
The interval is then Student's, after Welch. Where a side was run once, its logging intervals are
all there is. They are not independent either: neighbours share a cause, such as a falling clock. So
they are resampled (bootstrap) in blocks of neighbours.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from scripts.bench.results import student_t

RESAMPLES = 2000
CONFIDENCE = 0.95
DIGITS = 3
"""Decimals of a shown ratio; the verdict uses them too, so that the two never disagree."""

FEWEST = 5
"""Fewest intervals of a run for a verdict: with fewer, the ends of their range mean little."""


@dataclass(frozen=True)
class Ratio:
    """A ratio to the baseline, with its interval of CONFIDENCE."""

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
    """The geometric mean of the runs' medians."""
    return float(np.exp(np.mean(_log_medians(runs))))


def _log_medians(runs: Sequence[Sequence[float]]) -> np.ndarray:
    return np.log([np.median(values) for values in runs])


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
    low, high = _between_runs(ours, theirs) or _between_intervals(ours, theirs)
    return Ratio(
        centre(ours) / centre(theirs),
        low,
        high,
        min(len(ours), len(theirs)),
        min(len(run) for run in (*ours, *theirs)),
    )


def _between_runs(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> tuple[float, float] | None:
    """The interval of the ratio from the runs' medians; None unless both sides have several."""
    if min(len(ours), len(theirs)) < 2:
        return None
    logs = _log_medians(ours), _log_medians(theirs)
    errors = [float(np.var(side, ddof=1)) / len(side) for side in logs]
    freedom = sum(errors) ** 2 / (
        sum(error**2 / (len(side) - 1) for error, side in zip(errors, logs, strict=True)) or 1
    )
    middle = float(logs[0].mean() - logs[1].mean())
    reach = student_t(freedom) * math.sqrt(sum(errors))
    return math.exp(middle - reach), math.exp(middle + reach)


def _between_intervals(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """The interval of the ratio from resampled logging intervals."""
    generator = np.random.default_rng(0)
    ratios = _resample(ours, generator) / _resample(theirs, generator)
    return _middle(ratios)


def mean_interval_of_runs(values: Sequence[float]) -> tuple[float, float]:
    """The interval of CONFIDENCE around the mean of two independent measurements or more."""
    reach = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return mean - reach, mean + reach


def _middle(values: np.ndarray) -> tuple[float, float]:
    outside = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(values, [outside, 100 - outside])
    return float(low), float(high)


def _resample(runs: Sequence[Sequence[float]], generator: np.random.Generator) -> np.ndarray:
    """The centre of each of RESAMPLES redrawn sides, float64 [RESAMPLES]."""
    medians = np.stack([_resample_run(np.asarray(run, float), generator) for run in runs])
    drawn = generator.integers(len(runs), size=(len(runs), RESAMPLES))
    return np.exp(np.log(np.take_along_axis(medians, drawn, axis=0)).mean(axis=0))


def _resample_run(run: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Medians of one run, redrawn in blocks of neighbours; float64 [RESAMPLES]."""
    return np.concatenate([np.median(drawn, axis=1) for drawn in _redraw(run, generator)])


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval of CONFIDENCE around the mean of measurements in order."""
    generator = np.random.default_rng(0)
    means = np.concatenate([d.mean(axis=1) for d in _redraw(np.asarray(values, float), generator)])
    return _middle(means)


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
