"""The table of a comparison: a row per figure, a cell per run, and where each comes from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.compare.arms import Arm
from scripts.compare.noise import centre, quartiles
from scripts.compare.reading import on_cpu, partner
from scripts.compare.runs import TAIL, Run, final, largest, last, loss_gap, median, total

ABSENT = "–"  # noqa: RUF001
END = f"mean of the last {TAIL:.0%}"


@dataclass(frozen=True)
class Cell:
    """One figure of one run."""

    text: str
    spread: str = ""
    """The middle half of the measurements, if the figure is a median that varies."""
    short: str = ""
    """What a narrow terminal shows instead of `text`; empty for `text` itself."""


@dataclass(frozen=True)
class Row:
    """One figure of all runs."""

    label: str
    cells: list[Cell]
    source: str
    """How it is made from which metric of the run's folder."""


Figure = Callable[[Run], float | None]


def make_table(runs: Sequence[Run], baseline: Arm) -> list[Row]:
    """A row for each figure that at least one run has; gaps and ratios are to the baseline."""
    paths = [run.path for run in runs]
    alone = paths.count(baseline.path) == len(baseline.runs)
    base = baseline.path if alone else baseline.name
    emulated = " (CPU)" if on_cpu(runs) else ""
    speed = "throughput/tokens_per_sec"
    measured = [values for values in baseline.speeds() if values]
    base_speed = centre(measured) if measured else None

    def ratio(run: Run) -> float | None:
        ours = median(speed)(run)
        return ours / base_speed if ours and base_speed else None

    def gap(run: Run) -> float | None:
        return loss_gap(run, partner(run, baseline))

    rows = [
        Row("path", [Cell(path) for path in paths], "config.yaml: moe.path"),
        Row(
            "computed in",
            [_computed_in(run) for run in runs],
            "config.yaml: train.dtype; auto is bf16 on a GPU and fp32 on a CPU",
        ),
        Row(
            "steps",
            [Cell(str(run.rows[-1]["progress/step"])) for run in runs],
            "last progress/step",
        ),
        _final(runs, "final train loss", "loss/train", "{:.4f}"),
        _row(runs, "final valid loss", last("loss/valid"), "{:.4f}", "loss/valid, last"),
        _row(runs, "valid bits per byte", last("loss/valid_bpb"), "{:.4f}", "loss/valid_bpb, last"),
        _row(
            runs,
            f"train loss gap to {base}",
            gap,
            "{:+.3f} %",
            f"loss/train, {END} of common steps",
        ),
        _median(runs, "relayouts/layer, forward", "moe/scale_relayouts", "{:g}"),
        _median(runs, "relayouts/layer, backward", "moe/scale_relayouts_backward", "{:g}"),
        _median(runs, "kept for backward, MiB/layer", "moe/kept_mib", "{:,.2f}"),
        _median(runs, "dispatched MiB/step", "moe/dispatched_mib", "{:,.1f}"),
        _median(runs, f"tokens/s{emulated}", speed, "{:,.0f}"),
        _row(runs, f"speed / {base}{emulated}", ratio, "{:.3f}x", f"{speed}, medians"),
        _median(runs, f"ms/step{emulated}", "time/step_ms", "{:,.1f}"),
        *(
            []
            if emulated
            else [_median(runs, "TFLOP/s/GPU", "throughput/tflops_per_gpu", "{:,.1f}")]
        ),
        _median(runs, "MFU", "throughput/mfu", "{:.1f} %", 100),
        _largest(runs, "peak GPU memory GiB", "memory/peak_allocated_gib"),
        _largest(runs, "peak memory GiB", "memory/peak_rss_gib"),
        _median(runs, "busiest expert / mean", "moe/max_expert_load", "{:.2f}"),
        _largest(runs, "worst busiest expert / mean", "moe/max_expert_load"),
        _final(runs, "final busiest expert / mean", "moe/max_expert_load", "{:.2f}"),
        _final(runs, "final load entropy", "moe/load_entropy", "{:.3f}"),
        _row(
            runs,
            "dropped rows/step",
            largest("moe/dropped_rows"),
            "{:,.0f}",
            "moe/dropped_rows, largest",
        ),
        _count(runs, "repeated steps", "moe/redone_steps"),
        _count(runs, "steps that waited", "moe/waited_steps"),
    ]
    return [row for row in rows if any(cell.text != ABSENT for cell in row.cells)]


def _computed_in(run: Run) -> Cell:
    if run.device == "cpu" and run.path.startswith("fp8"):
        return Cell(f"{run.computed_in}, FP8 emulated", short="emulated")
    return Cell(run.computed_in)


def _row(runs: Sequence[Run], label: str, figure: Figure, form: str, source: str) -> Row:
    return Row(label, [Cell(_text(figure(run), form)) for run in runs], source)


def _final(runs: Sequence[Run], label: str, metric: str, form: str) -> Row:
    return _row(runs, label, final(metric), form, f"{metric}, {END}")


def _largest(runs: Sequence[Run], label: str, metric: str) -> Row:
    return _row(runs, label, largest(metric), "{:.2f}", f"{metric}, largest")


def _count(runs: Sequence[Run], label: str, metric: str) -> Row:
    return _row(runs, label, total(metric), "{:,.0f}", f"{metric}, sum")


def _median(runs: Sequence[Run], label: str, metric: str, form: str, times: float = 1) -> Row:
    cells = []
    for run in runs:
        values = [value * times for value in run.finite(metric)]
        middle = median(metric)(run)
        text = _text(None if middle is None else middle * times, form)
        spread = ""
        if values and min(values) != max(values):
            low, high = (form.format(value) for value in quartiles(values))
            spread = f"{low} to {high}"
        cells.append(Cell(text, spread))
    return Row(label, cells, f"{metric}, median")


def _text(value: float | None, form: str) -> str:
    if value is None:
        return ABSENT
    return form.format(value) if math.isfinite(value) else "not finite"
