"""The charts of the page: what `compare.png` shows and more, to be read, hidden and zoomed.

All of that is in the specification, as parameters (https://vega.github.io/vega-lite/docs/parameter)
that follow controls of HTML and the pointer. `page.js` only hands it to the library and says how
wide the page is.

A parameter with `on` takes its value from events, in the language of Vega's signals: Vega-Lite
hands that on as it is. Its own selections would draw a cell around every point to find the nearest.
"""

import json
from collections.abc import Sequence
from typing import Any

from scripts.compare.arms import Arm
from scripts.compare.curves import (
    SCREEN,
    Chart,
    Spec,
    across,
    choose_charts,
    colors,
    config,
    curves,
    make_data,
    title_of,
    up,
)
from scripts.compare.runs import Run

HEIGHT = 210
READOUT = 58
"""Pixels that a number over a chart takes; so many stand in a row on a phone:"""
IN_A_ROW = 5

HERE = "clamp(invert('x', x(group())), shown[0], shown[1])"
"""Where the pointer is, on the horizontal axis."""

NEAREST: list[Spec] = [
    {"calculate": "abs(datum.x - place)", "as": "far"},
    {"joinaggregate": [{"op": "min", "field": "far", "as": "least"}]},
    {"filter": "datum.far === datum.least"},
]
"""The rows at the logged step that is nearest to `place`."""


def make_charts(runs: Sequence[Run], baseline: Arm) -> Spec:
    """All charts of the page, in Vega-Lite."""
    data = make_data(runs, baseline)
    shown = ",".join(f"show{place}" for place in range(len(runs)))
    data["transform"] += [
        {"calculate": "datum[axis]", "as": "x"},
        {"filter": f"[{shown}][datum.run] && isValid(datum.x)"},
        {"filter": "inrange(datum.x, shown)"},
    ]
    look = config(SCREEN)
    look["axisY"] = {"minExtent": 48, "maxExtent": 48}  # so that the charts stand in line
    look["title"] |= {"dx": -48, "offset": 8, "fontSize": 14}
    look["view"]["continuousHeight"] = HEIGHT
    return {
        "params": _parameters(runs),
        **data,
        "concat": [_chart(chart, runs, baseline) for chart in choose_charts(runs)],
        "resolve": {"scale": {"x": "shared"}},
        "bounds": "flush",
        "config": look | {"background": None, "padding": 0, "legend": {"disable": True}},
    }


def _parameters(runs: Sequence[Run]) -> list[Spec]:
    """What controls and the pointer change. Later ones are made of earlier ones."""
    steps = sorted({row["progress/step"] for run in runs for row in run.rows})
    apart = min((b - a for a, b in zip(steps, steps[1:], strict=False)), default=1)
    tokens = sorted(value for run in runs for value in run.finite("progress/tokens"))
    ends = {"step": [steps[0], steps[-1]], "tokens": [tokens[0], tokens[-1]] if tokens else [0, 1]}
    return [
        *(
            _control(f"show{place}", True, "legend", input="checkbox", name=run.name)
            for place, run in enumerate(runs)
        ),
        _control(
            "axis", "tokens", "tools", input="radio", options=["tokens", "step"], name="x axis"
        ),
        {"name": "steps", "value": ends["step"]},
        {"name": "whole", "expr": f"({json.dumps(ends)})[axis]"},
        {
            "name": "zoom",
            "value": None,
            "on": [
                {"events": {"signal": "axis"}, "update": "null"},
                {"events": "view:dblclick", "update": "null"},
                {
                    "events": "window:pointerup",
                    "update": "brush && abs(span(brush)) > span(shown) / 50 "
                    "? [min(brush[0], brush[1]), max(brush[0], brush[1])] : zoom",
                },
            ],
        },
        {"name": "shown", "expr": "zoom || whole"},
        # Steps and tokens grow together, so that a place on one axis is a place on the other.
        {
            **_control(
                "at", steps[-1], "tools", input="range", min=steps[0], max=steps[-1], step=apart,
                name="read at step",
            ),
            "on": [
                {
                    "events": "rect:pointermove, rect:pointerdown",
                    "update": f"steps[0] + {apart} * round(({HERE} - whole[0]) / (span(whole) || 1)"
                    f" * span(steps) / {apart})",
                }
            ],
        },
        {
            "name": "place",
            "expr": "whole[0] + (at - steps[0]) / (span(steps) || 1) * span(whole)",
        },
        {
            "name": "brush",
            "value": None,
            "on": [
                {"events": "rect:pointerdown[event.pointerType !== 'touch']", "update": f"[{HERE}, {HERE}]"},
                {
                    "events": "[rect:pointerdown[event.pointerType !== 'touch'], window:pointerup]"
                    " > rect:pointermove",
                    "update": f"[brush[0], {HERE}]",
                },
                {"events": "window:pointerup", "update": "null"},
            ],
        },
    ]  # fmt: skip


def _control(name: str, value: object, place: str, /, **bind: Any) -> Spec:
    return {"name": name, "value": value, "bind": {**bind, "element": f"#{place}"}}


def _chart(chart: Chart, runs: Sequence[Run], baseline: Arm) -> Spec:
    ends = [{"expr": "shown[0]"}, {"expr": "shown[1]"}]
    x = across("x") | {"scale": {"domain": ends, "nice": False}}
    y = up(chart.column)
    color = colors(runs, SCREEN)
    here = [*NEAREST, {"filter": f"isValid(datum.{chart.column})"}]
    across_all = {"x": _at("shown[0]"), "x2": _at("shown[1]")}
    dot = {"type": "point", "filled": True, "opacity": 1, "size": 60}
    return {
        "title": title_of(chart, runs, baseline),
        "layer": [
            *curves(chart, runs, SCREEN, x, y),
            {
                "transform": NEAREST,
                "mark": {"type": "rule", "color": SCREEN.soft_ink},
                "encoding": {"x": x},
            },
            {"transform": here, "mark": dot, "encoding": {"x": x, "y": y, "color": color}},
            {
                "transform": here,
                "mark": {
                    "type": "text", "align": "right", "fontSize": 12, "fontWeight": "bold",
                    "dx": {"expr": f"{READOUT} * (datum.run % {IN_A_ROW} - {min(len(runs), IN_A_ROW) - 1})"},
                    "dy": {"expr": f"-10 - 15 * floor(datum.run / {IN_A_ROW})"},
                    "y": 0,
                },
                "encoding": {
                    "x": _at("shown[1]"),
                    "text": {"field": chart.column, "type": "quantitative", "format": chart.form},
                    "color": color,
                },
            },
            {
                "data": {"values": [{}]},
                "mark": {
                    "type": "text", "text": {"expr": "axis"}, "align": "right", "fontSize": 12,
                    "color": SCREEN.soft_ink, "y": HEIGHT, "dy": 34,
                },
                "encoding": {"x": _at("shown[1]")},
            },
            {
                "data": {"values": [{}]},
                "mark": {"type": "rect", "color": "var(--link)", "opacity": {"expr": "brush ? 0.15 : 0"}},
                "encoding": {
                    "x": _at("(brush || shown)[0]"),
                    "x2": _at("(brush || shown)[1]"),
                },
            },
            _tooltip(chart, runs, across_all),
        ],
    }  # fmt: skip


def _at(place: str) -> Spec:
    """A place on the horizontal axis that an expression gives."""
    return {"datum": {"expr": place}, "type": "quantitative"}


def _tooltip(chart: Chart, runs: Sequence[Run], across_all: Spec) -> Spec:
    """An unseen sheet over the chart, which takes the pointer and tells all values of one step."""
    pivot: list[Spec] = [
        {"calculate": "'y' + datum.run", "as": "who"},
        {"pivot": "who", "value": chart.column, "groupby": ["step", "tokens"]},
    ]
    texts: list[Spec] = [
        {
            "calculate": f"isValid(datum.y{place}) ? format(datum.y{place}, '{chart.form}') : '-'",
            "as": f"text{place}",
        }
        for place in range(len(runs))
    ]
    told = [
        {"field": "step", "title": "step", "type": "quantitative", "format": ","},
        {"field": "tokens", "title": "tokens", "type": "quantitative", "format": ","},
        *({"field": f"text{i}", "title": run.name, "type": "nominal"} for i, run in enumerate(runs)),
    ]
    return {
        "transform": [*NEAREST, *pivot, *texts],
        "mark": {"type": "rect", "opacity": 0, "cursor": "crosshair"},
        "encoding": {**across_all, "tooltip": told},
    }
