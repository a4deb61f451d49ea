"""Fit what a plan cannot count on some measured steps, check it on the others, and write both down.

    python -m scripts.plan.fit                # writes docs/results/plan_fit.json
    python -m scripts.bench.readme            # and the table of docs/planning.md from it

Which steps are fitted is written in scripts/plan/rows.py. Fitted are three figures: the bytes that
peaks have beyond what is counted; passes over the residual stream, which stand for everything in a
layer that is neither a GEMM nor attention nor the experts' own; and the share of cuBLAS's rate that
TransformerEngine's FP8 GEMMs of all experts reach.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts import terminal
from scripts.bench.results import write_json
from scripts.plan.rates import RESULTS, Rates
from scripts.plan.rates import measured as measured_rates
from scripts.plan.rows import (
    FITTED_FILE,
    FITTED_MEMORY,
    FITTED_SITTING,
    FITTED_TIME,
    Measured,
    measured,
)
from scripts.plan.time import Fit, layer_ms, parts_ms
from train.metrics.environment import commit
from train.planning.memory import FIT, GIB, peak

MEMORY_BOUND, TIME_BOUND = 0.05, 0.15
"""Largest errors of checked rows, as a share of what was measured."""


def fit_overhead(rows: Sequence[Measured]) -> float:
    """GiB that the fitted rows have beyond what is counted, on average."""
    beyond = [
        row.peak_gib - peak(row.shape, overhead=0).total / GIB
        for row in rows
        if row.fits_memory and row.peak_gib is not None
    ]
    return statistics.fmean(beyond)


def fit_time(rows: Sequence[Measured], rates: Rates) -> Fit:
    """Passes from rows of `bf16`, by least squares; then the share from rows of the stock GEMMs."""
    fitted = [
        (row, row.step_ms)
        for row in rows
        if row.fits_time and row.step_ms is not None and not row.is_layer
    ]
    points = []
    for row, ms in fitted:
        if row.shape.linear == "bf16":
            counted, with_one = (_total(row, rates, Fit(passes, 1.0)) for passes in (0.0, 1.0))
            points.append((with_one - counted, ms - counted))
    passes = sum(a * c for a, c in points) / sum(a * a for a, _ in points)
    shares = []
    for row, ms in fitted:
        if row.shape.linear == "stock":
            parts = parts_ms(row.shape, row.machine, rates, Fit(passes, 1.0))
            gemms = parts["expert GEMMs"] + parts["expert weight gradients"]
            shares.append(gemms / (ms - sum(parts.values()) + gemms))
    return Fit(passes, statistics.fmean(shares))


def _total(row: Measured, rates: Rates, fit: Fit) -> float:
    if row.is_layer:
        return layer_ms(row.shape, row.machine, rates, fit)
    return sum(parts_ms(row.shape, row.machine, rates, fit).values())


def result(results: Path = RESULTS) -> dict[str, Any]:
    """What the file holds. Raises OSError, KeyError, ValueError for a broken file of results."""
    rows, rates = measured(results), measured_rates(results)
    of_memory = sum(row.fits_memory for row in rows)
    of_time = sum(row.fits_time and not row.is_layer for row in rows)
    if (of_memory, of_time) != (len(FITTED_MEMORY), len(FITTED_TIME)):
        raise ValueError(
            f"{FITTED_FILE} has not all rows of the sitting {FITTED_SITTING} that plans are fitted "
            "on (scripts/plan/rows.py)"
        )
    overhead = fit_overhead(rows)
    found = fit_time(rows, rates)
    *gpus, most = sorted({row.shape.ranks for row in rows})
    names = sorted({row.machine.name for row in rows})
    return {
        "machine": f"{', '.join(map(str, gpus))} and {most} x {' and '.join(names)}",
        "commit": commit(),
        "bounds": {"memory": MEMORY_BOUND, "time": TIME_BOUND},
        "memory": {"overhead_gib": overhead},
        "time": vars(found),
        "rows": [_row(row, rates, overhead, found) for row in rows],
    }


def _row(row: Measured, rates: Rates, overhead: float, fit: Fit) -> dict[str, Any]:
    said: dict[str, Any] = {"planned": row.name, "source": row.source}
    if row.peak_gib is not None:
        planned = peak(row.shape, overhead * GIB).total / GIB
        said |= _errors("gib", row.peak_gib, planned, _role(row, row.fits_memory))
    if row.step_ms is not None:
        ms = _total(row, rates, fit)
        said |= _errors("ms", row.step_ms, ms, _role(row, row.fits_time))
    return said


def _role(row: Measured, is_fitted: bool) -> str:
    return "fitted" if is_fitted else "assumed" if row.is_assumed else "checked"


def _errors(unit: str, found: float, planned: float, role: str) -> dict[str, Any]:
    return {
        f"measured_{unit}": round(found, 3),
        f"planned_{unit}": round(planned, 3),
        f"error_{unit}": round(planned / found - 1, 4),
        f"role_{unit}": role,
    }


def beyond(result: dict[str, Any]) -> list[str]:
    """A line for each checked row that is out of bounds."""
    bounds = {"gib": result["bounds"]["memory"], "ms": result["bounds"]["time"]}
    return [
        f"{row['planned']}: measured {row[f'measured_{unit}']} {unit}, planned "
        f"{row[f'planned_{unit}']} ({row[f'error_{unit}']:+.1%}, bound {bound:.0%})"
        for row in result["rows"]
        for unit, bound in bounds.items()
        if row.get(f"role_{unit}") == "checked" and abs(row[f"error_{unit}"]) > bound
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a row is out of bounds, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plan.fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--out", type=Path, default=FIT, metavar="FILE.json")
    options = parser.parse_args(arguments)
    try:
        found = result(options.results)
    except (OSError, KeyError, ValueError) as error:
        print(f"error: {options.results}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    try:
        write_json(options.out, found)
    except (OSError, ValueError) as error:
        print(f"error: --out {options.out} cannot be written: {error}", file=sys.stderr)
        return 2
    for row in found["rows"]:
        parts = [
            f"{row[f'error_{unit}']:+7.1%} {unit} {row[f'role_{unit}']}"
            for unit in ("gib", "ms")
            if f"error_{unit}" in row
        ]
        print(f"{row['planned']:<72} {'  '.join(parts)}")
    print(f"{options.out}: {found['memory']}, {found['time']}")
    for line in beyond(found):
        print(f"out of bounds: {line}", file=sys.stderr)
    return 1 if beyond(found) else 0


if __name__ == "__main__":
    terminal.run(main)
