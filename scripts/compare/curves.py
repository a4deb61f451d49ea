"""The curves of a comparison in Vega-Lite: one specification for the page, `compare.png` and W&B.

Vega-Lite is JSON, so these are dictionaries; `vl_convert` draws them without a browser, and a
browser draws them with the library that the page carries (page/interaction.py).
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.compare.arms import Arm
from scripts.compare.colors import COLORS, COVERED
from scripts.compare.reading import on_cpu, partner
from scripts.compare.runs import Run

Spec = dict[str, Any]
"""Vega-Lite, or a part of it."""

DASHES: tuple[list[int], ...] = ([], [7, 4], [2, 3], [9, 3, 2, 3])
"""Of runs of one path, in turn."""


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    column: str
    """Of the table that `make_rows` writes."""
    title: str
    metric: str
    """Its name in metrics.jsonl; empty for the gap, which is computed."""
    form: str = ",.4f"
    """How a value that is read off is written, in d3's format language."""
    unit: str = ""
    """Along the vertical axis, where the title does not say it."""


LOSS = Chart("loss", "Training loss", "loss/train", unit="cross-entropy, nats per token")
CHARTS = (
    LOSS,
    Chart("gap", "Gap of the training loss, %", "", "+.3f"),
    Chart("speed", "Tokens per second", "throughput/tokens_per_sec", ",.0f"),
    Chart("memory", "Peak GPU memory, GiB", "memory/peak_allocated_gib", ",.2f"),
    Chart("busiest", "Busiest expert over the mean", "moe/max_expert_load"),
    Chart("norm", "Gradient norm", "optim/grad_norm"),
)
VALID = "valid"
"""The column of the validation loss, drawn as dots beside the training loss."""


@dataclass(frozen=True)
class Look:
    """Colours and font: of CSS variables on the page, plain ones elsewhere."""

    color: Callable[[str], str]
    """A path's."""
    ink: str
    soft_ink: str
    line: str
    font: str


PAPER = Look(lambda path: COLORS[path].paper, "#1c1c1e", "#4a4a52", "#e4e4e8", "sans-serif")
SCREEN = Look(
    lambda path: f"var(--{path})", "var(--ink)", "var(--soft-ink)", "var(--line)", "system-ui"
)


def choose_charts(runs: Sequence[Run]) -> list[Chart]:
    """The loss, and those of which a run has a finite value; a gap needs two runs."""

    def has_values(chart: Chart) -> bool:
        if not chart.metric:
            return len(runs) > 1
        return any(run.finite(chart.metric) for run in runs)

    return [chart for chart in CHARTS if chart is LOSS or has_values(chart)]


def _columns(runs: Sequence[Run]) -> list[str]:
    return ["place", "step", "tokens", VALID, *(chart.column for chart in choose_charts(runs))]


def make_rows(runs: Sequence[Run], baseline: Arm) -> str:
    """A line of CSV for each logged step of each run; empty where a value is missing or not finite.

    `place` is the run's among `runs`. Seven digits are more than a screen shows.
    """
    metrics = ["progress/tokens", "loss/valid", *(chart.metric for chart in choose_charts(runs))]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(_columns(runs))
    for place, run in enumerate(runs):
        columns = [run.series(name) if name else _gaps(run, baseline) for name in metrics]
        for row in run.rows:
            step = row["progress/step"]
            values = (column.get(step, math.nan) for column in columns)
            rows.writerow([place, step, *map(_text, values)])
    return file.getvalue()


def _text(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return str(int(value)) if value == int(value) else f"{value:.7g}"


def _gaps(run: Run, baseline: Arm) -> Mapping[int, float]:
    """Percent by step, where both have logged one."""
    theirs = partner(run, baseline).series("loss/train")
    return {
        step: (loss - theirs[step]) / theirs[step] * 100
        for step, loss in run.series("loss/train").items()
        if theirs.get(step)
    }


def make_data(runs: Sequence[Run], baseline: Arm) -> Spec:
    """The table as Vega-Lite's `data` and the `transform` that gives each row its run's name."""
    # As data, so that no name is ever read as an expression.
    names = {"values": [{"place": place, "run": run.name} for place, run in enumerate(runs)]}
    return {
        "data": {
            "values": make_rows(runs, baseline),
            "format": {"type": "csv", "parse": dict.fromkeys(_columns(runs), "number")},
        },
        "transform": [
            {"lookup": "place", "from": {"data": names, "key": "place", "fields": ["run"]}}
        ],
    }


def title_of(chart: Chart, runs: Sequence[Run], baseline: Arm) -> str:
    if chart is LOSS and _validated(runs):
        return f"{chart.title} (dots: validation)"
    if chart.column == "gap":
        return f"Gap of the training loss to {baseline.name}, %"
    emulated = chart.column == "speed" and on_cpu(runs)
    return f"{chart.title} (CPU, emulated)" if emulated else chart.title


def _validated(runs: Sequence[Run]) -> bool:
    return any(run.finite("loss/valid") for run in runs)


def axes_of(runs: Sequence[Run]) -> list[str]:
    """The columns that can be drawn across, the usual one first."""
    return ["tokens", "step"] if any(run.finite("progress/tokens") for run in runs) else ["step"]


def across(field: str, title: str | None = None) -> Spec:
    """The horizontal axis: tokens as 400k or 10M; it begins where the runs do."""
    scale = {"zero": False, "nice": False}
    axis = {"format": "~s", "tickCount": 5}
    return {"field": field, "type": "quantitative", "title": title, "axis": axis, "scale": scale}


def up(field: str, title: str | None = None) -> Spec:
    """The vertical axis."""
    scale = {"zero": False}
    axis = {"tickCount": 5, "grid": True}
    return {"field": field, "type": "quantitative", "title": title, "axis": axis, "scale": scale}


def by_run(runs: Sequence[Run], values: Sequence[object]) -> Spec:
    """A channel that tells runs apart: a value for each."""
    scale = {"type": "ordinal", "domain": [run.name for run in runs], "range": list(values)}
    return {"field": "run", "type": "ordinal", "sort": None, "title": None, "scale": scale}


def colors(runs: Sequence[Run], look: Look) -> Spec:
    return by_run(runs, [look.color(run.path) for run in runs])


def covered(runs: Sequence[Run]) -> list[bool]:
    """Of each run, whether its curve is drawn wide and pale, so that it is seen below another one.

    Curves of losses coincide to the eye: so where no two runs train to the same bits, it is the
    first run's.
    """
    paths = {run.path for run in runs}
    found = [COVERED.get(run.path) in paths for run in runs]
    return found if any(found) or len(runs) < 2 else [True, *found[1:]]


def curves(chart: Chart, runs: Sequence[Run], look: Look, x: Spec, y: Spec) -> list[Spec]:
    """The layers of a chart: a line for each run, and dots where there are validation losses."""
    wide = covered(runs)
    before = [sum(other.path == run.path for other in runs[:i]) for i, run in enumerate(runs)]
    line: Spec = {
        "x": x,
        "y": y,
        "description": {"field": "run", "type": "nominal"},
        "color": colors(runs, look),
        "strokeDash": by_run(runs, [DASHES[count % len(DASHES)] for count in before]),
        "strokeWidth": by_run(runs, [5 if one else 1.8 for one in wide]),
        "opacity": by_run(runs, [0.45 if one else 1 for one in wide]),
    }
    layers: list[Spec] = [{"mark": {"type": "line", "clip": True}, "encoding": line}]
    if chart.column == "gap":
        layers.insert(0, _zero_line(look))
    if chart is LOSS and _validated(runs):
        dot = {"type": "point", "filled": True, "opacity": 1, "size": 40}
        dots = {"x": x, "y": {**y, "field": VALID}, "color": colors(runs, look)}
        layers.append(
            {"transform": [{"filter": f"isValid(datum.{VALID})"}], "mark": dot, "encoding": dots}
        )
    return layers


def _zero_line(look: Look) -> Spec:
    mark = {"type": "rule", "strokeDash": [4, 3], "color": look.soft_ink}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": {"y": {"datum": 0}}}


def config(look: Look) -> Spec:
    """Colours and sizes of axes, titles and legends: Vega-Lite's `config`."""
    return {
        "font": look.font,
        "view": {"stroke": None},
        "axis": {
            "labelColor": look.soft_ink, "titleColor": look.soft_ink, "gridColor": look.line,
            "domain": False, "ticks": False, "labelFontSize": 12, "titleFontSize": 12,
            "titleFontWeight": "normal", "labelPadding": 6,
        },
        "axisX": {"grid": False},
        "title": {
            "anchor": "start", "frame": "group", "color": look.ink, "fontSize": 15, "offset": 12,
        },
        "legend": {"labelColor": look.ink, "labelFontSize": 12, "labelLimit": 0},
    }  # fmt: skip
