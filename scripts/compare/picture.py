"""`compare.png`: the losses and their gap to the baseline, black on white."""

from collections.abc import Sequence

import vl_convert

from scripts.compare.arms import Arm
from scripts.compare.curves import (
    PAPER,
    Spec,
    across,
    axes_of,
    choose_charts,
    config,
    curves,
    make_data,
    title_of,
    up,
)
from scripts.compare.runs import Run

PANELS = ("loss", "gap")


def make_picture(runs: Sequence[Run], baseline: Arm) -> Spec:
    """The panels side by side, in Vega-Lite; the legend below them, where it hides no curve."""
    x = across(axes_of(runs)[0], axes_of(runs)[0])
    panels = [
        {
            "title": title_of(chart, runs, baseline),
            "layer": curves(chart, runs, PAPER, x, up(chart.column, chart.unit)),
            "width": 440,
            "height": 240,
        }
        for chart in choose_charts(runs)
        if chart.column in PANELS
    ]
    look = config(PAPER)
    look["legend"] |= {"orient": "bottom", "columns": 3 * len(panels), "symbolType": "stroke"}
    look["legend"] |= {"symbolSize": 400, "columnPadding": 24}
    return {
        **make_data(runs, baseline),
        "hconcat": panels,
        "bounds": "flush",
        "spacing": 80,
        "config": look,
        "background": "white",
        "padding": 12,
    }


def make_png(runs: Sequence[Run], baseline: Arm) -> bytes:
    """The picture, to be written to a file."""
    return vl_convert.vegalite_to_png(make_picture(runs, baseline), scale=2)
