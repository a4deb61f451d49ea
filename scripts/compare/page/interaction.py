"""The charts of the page: what `compare.png` shows and more, to be read, hidden and zoomed.

All of that is in the specification, as parameters that follow HTML's controls and the pointer
(https://vega.github.io/vega-lite/docs/parameter.html). `page.js` hands it to the library and says
how wide the page is.

A parameter with `on` takes its value from events, as Vega's signals do; Vega-Lite passes that on.
Its own way to find the point nearest to the pointer draws a shape around every point of the data.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from scripts.compare.arms import Arm
from scripts.compare.curves import (
    SCREEN,
    Chart,
    Spec,
    across,
    axes_of,
    choose_charts,
    colors,
    config,
    curves,
    make_data,
    title_of,
    up,
)
from scripts.compare.runs import Run

# Pixels.
HEIGHT = 210
AXIS = 48
"""The labels of the vertical axis."""
BESIDE = AXIS + 10
"""What a chart needs beside its curves: the axis, and half a label at the other end."""
READOUT = 58
"""A number over a chart; a phone has room for"""
IN_A_ROW = 5

PADDING = {"top": 4, "right": 0, "bottom": 4, "left": 0}

NOTHING: Spec = {"values": [{}]}
"""Data of one row, for what is drawn once."""

POINTER = "clamp(invert('x', x(group())), shown[0], shown[1])"
"""Where the pointer is on the horizontal axis."""
NOT_TOUCH = "[event.pointerType !== 'touch']"  # a finger scrolls the page

NEAREST: list[Spec] = [
    {"calculate": "abs(datum.x - spot)", "as": "far"},
    {"joinaggregate": [{"op": "min", "field": "far", "as": "least"}]},
    {"filter": "datum.far === datum.least"},
]
"""The rows at the logged step that is nearest to `spot`."""


def make_charts(runs: Sequence[Run], baseline: Arm) -> Spec:
    """All charts of the page, in Vega-Lite; `page.js` adds how many columns, and how wide."""
    shown = ",".join(f"show{place}" for place in range(len(runs)))
    spec = make_data(runs, baseline)
    spec["transform"] += [
        {"calculate": "datum[axis]", "as": "x"},
        {"filter": f"[{shown}][datum.place] && isValid(datum.x) && inrange(datum.x, shown)"},
    ]
    look = config(SCREEN)
    look["title"] |= {"dx": -AXIS, "offset": 8, "fontSize": 14}
    look["axisY"] = {"minExtent": AXIS, "maxExtent": AXIS}  # so that the charts stand in line
    look["view"]["continuousHeight"] = HEIGHT
    look |= {"background": None, "padding": PADDING, "legend": {"disable": True}}
    return spec | {
        "description": "Charts of the runs by tokens or steps",
        "params": [*_shown_runs(runs), *_axis(runs), *_zoom(), *_reading(runs)],
        "concat": [_chart(chart, runs, baseline) for chart in choose_charts(runs)],
        "resolve": {"scale": {"x": "shared"}},
        "bounds": "flush",
        "spacing": {"column": BESIDE + 16, "row": 85 + 15 * _readout_rows(runs)},
        "config": look,
        "usermeta": {"beside": BESIDE, "names": [run.name for run in runs]},
    }


def _control(signal: str, value: object, where: str, /, **bind: Any) -> Spec:
    """A parameter that a control in the element `where` changes."""
    return {"name": signal, "value": value, "bind": {**bind, "element": f"#{where}"}}


def _shown_runs(runs: Sequence[Run]) -> list[Spec]:
    return [
        _control(f"show{place}", True, "legend", input="checkbox", name=run.name)
        for place, run in enumerate(runs)
    ]


def _steps(runs: Sequence[Run]) -> list[int]:
    """All that were logged, in order."""
    return sorted({row["progress/step"] for run in runs for row in run.rows})


def _axis(runs: Sequence[Run]) -> list[Spec]:
    """`axis`, what is drawn across; `whole`, from where to where that goes; `steps`, in steps."""
    values: dict[str, list[float]] = {
        "step": [*_steps(runs)],
        "tokens": [value for run in runs for value in run.finite("progress/tokens")],
    }
    ends = {name: _ends(found) for name, found in values.items() if found}
    names = axes_of(runs)
    return [
        _control("axis", names[0], "tools", input="radio", name="x axis", options=names),
        {"name": "whole", "expr": f"({json.dumps(ends)})[axis]"},
        {"name": "steps", "value": ends["step"]},
    ]


def _ends(values: Sequence[float]) -> list[float]:
    """From where to where an axis goes; of one value, around it."""
    low, high = min(values), max(values)
    return [low, high] if low < high else [low - 1, high + 1]


def _zoom() -> list[Spec]:
    """`brush`, what is being dragged over; `zoom`, what then was; `shown`, what charts show."""
    begun = f"rect:pointerdown{NOT_TOUCH}"
    return [
        {
            "name": "zoom",
            "value": None,
            "on": [
                {"events": {"signal": "axis"}, "update": "null"},
                {"events": "view:dblclick", "update": "null"},
                {
                    "events": "window:pointerup",
                    "update": "brush && abs(span(brush)) > span(shown) / 50 ? "
                    "[min(brush[0], brush[1]), max(brush[0], brush[1])] : zoom",
                },
            ],
        },
        {"name": "shown", "expr": "zoom || whole"},
        {
            "name": "brush",
            "value": None,
            "on": [
                {"events": begun, "update": f"[{POINTER}, {POINTER}]"},
                {
                    "events": f"[{begun}, window:pointerup] > rect:pointermove",
                    "update": f"[brush[0], {POINTER}]",
                },
                {"events": "window:pointerup", "update": "null"},
            ],
        },
    ]


def _reading(runs: Sequence[Run]) -> list[Spec]:
    """`at`, the step that is read off, of pointer or slider; `spot`, its place on the axis.

    Tokens grow with the steps, so a share of one axis is the same share of the other.
    """
    steps = _steps(runs)
    apart = min((b - a for a, b in itertools.pairwise(steps)), default=1)
    pointed = f"({POINTER} - whole[0]) / span(whole) * span(steps)"
    slider = {"min": steps[0], "max": steps[-1], "step": apart}
    return [
        {
            **_control("at", steps[-1], "tools", input="range", name="read at step", **slider),
            "on": [
                {
                    "events": "rect:pointermove, rect:pointerdown",
                    "update": f"steps[0] + {apart} * round({pointed} / {apart})",
                }
            ],
        },
        {"name": "spot", "expr": "whole[0] + (at - steps[0]) / span(steps) * span(whole)"},
    ]


def _chart(chart: Chart, runs: Sequence[Run], baseline: Arm) -> Spec:
    ends = [{"expr": "shown[0]"}, {"expr": "shown[1]"}]
    x = across("x") | {"scale": {"domain": ends, "nice": False}}
    y, color = up(chart.column), colors(runs, SCREEN)
    here = [*NEAREST, {"filter": f"isValid(datum.{chart.column})"}]
    rule: Spec = {"type": "rule", "color": SCREEN.soft_ink}
    dot: Spec = {"type": "point", "filled": True, "opacity": 1, "size": 60}
    brush: Spec = {"type": "rect", "color": "var(--link)", "opacity": {"expr": "brush ? 0.15 : 0"}}
    name: Spec = {
        "type": "text", "text": {"expr": "axis"}, "align": "right", "fontSize": 12,
        "color": SCREEN.soft_ink, "y": HEIGHT, "dy": 34,
    }  # fmt: skip
    return {
        "title": title_of(chart, runs, baseline),
        "layer": [
            *curves(chart, runs, SCREEN, x, y),
            {"data": NOTHING, "mark": name, "encoding": {"x": _at("shown[1]")}},
            {"transform": NEAREST, "mark": rule, "encoding": {"x": x}},
            {"transform": here, "mark": dot, "encoding": {"x": x, "y": y, "color": color}},
            _readout(chart, runs) | {"transform": here},
            {"data": NOTHING, "mark": brush, "encoding": _band("(brush || shown)")},
            _tooltip(chart, runs),
        ],
    }


def _at(expression: str) -> Spec:
    """A place on the horizontal axis."""
    return {"datum": {"expr": expression}, "type": "quantitative"}


def _band(ends: str) -> Spec:
    """From one place on the horizontal axis to another, as high as the chart."""
    return {"x": _at(f"{ends}[0]"), "x2": _at(f"{ends}[1]")}


def _readout_rows(runs: Sequence[Run]) -> int:
    return 1 + (len(runs) - 1) // IN_A_ROW


def _readout(chart: Chart, runs: Sequence[Run]) -> Spec:
    """The numbers over a chart, in the runs' colours and order."""
    last = min(len(runs), IN_A_ROW) - 1
    highest = 15 * _readout_rows(runs) - 5
    # Nearer to the colour of text: letters are thinner than curves.
    inks = [f"color-mix(in oklab, {SCREEN.color(run.path)} 70%, {SCREEN.ink})" for run in runs]
    return {
        "mark": {
            "type": "text", "align": "right", "fontSize": 12, "fontWeight": "bold", "y": 0,
            "color": {"expr": f"{json.dumps(inks)}[datum.place]"},
            "dx": {"expr": f"{READOUT} * (datum.place % {IN_A_ROW} - {last})"},
            "dy": {"expr": f"15 * floor(datum.place / {IN_A_ROW}) - {highest}"},
        },
        "encoding": {
            "x": _at("shown[1]"),
            "text": {"field": chart.column, "type": "quantitative", "format": chart.form},
        },
    }  # fmt: skip


def _tooltip(chart: Chart, runs: Sequence[Run]) -> Spec:
    """An unseen sheet over the chart that takes the pointer, and names the runs' values.

    A field called `title` is the tooltip's head. `page.js` names the others, as it is not every
    name of a run that can be the name of a field, and leaves out those without text.
    """
    texts = {
        f"text{place}": f"isValid(datum.y{place}) ? format(datum.y{place}, '{chart.form}') : ''"
        for place in range(len(runs))
    }
    where = "axis === 'step' ? 'step ' + format(datum.x, ',') : format(datum.x, ',') + ' tokens'"
    return {
        "transform": [
            *NEAREST,
            {"calculate": "'y' + datum.place", "as": "column"},
            {"pivot": "column", "value": chart.column, "groupby": ["x"]},
            {"calculate": where, "as": "where"},
            *({"calculate": text, "as": name} for name, text in texts.items()),
        ],
        "mark": {"type": "rect", "opacity": 0, "cursor": "crosshair"},
        "encoding": {
            **_band("shown"),
            "tooltip": [
                {"field": "where", "title": "title", "type": "nominal"},
                *(
                    {"field": name, "title": f"{place}", "type": "nominal"}
                    for place, name in enumerate(texts)
                ),
            ],
        },
    }
