"""What a W&B dashboard of this project shows: sections of panels, each of logged metrics."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import wandb_workspaces.reports.v2 as wr

from scripts.compare.curves import Spec, across, up
from train.profiling.step import PARTS

TOKENS, STEP = "progress/tokens", "progress/step"

STEP_PARTS = [f"time/{part}_ms" for part in (*PARTS, "other")]
"""What a profiled step (`train.profile: true`) is divided into."""

Panel = wr.LinePlot | wr.BarPlot | wr.MediaBrowser | wr.CustomChart | wr.RunComparer
Draw = Callable[[str, list[str]], Panel]


@dataclass(frozen=True)
class Show:
    """One panel: a title, the metrics it needs at least one of, and how to draw those."""

    title: str
    metrics: list[str]
    draw: Draw


def _curves(x: str) -> Draw:
    def draw(title: str, metrics: list[str]) -> Panel:
        axis = "tokens" if x == TOKENS else "step"
        return wr.LinePlot(title=title, x=x, y=[*metrics], title_x=axis, smoothing_type="none")

    return draw


def _bars(title: str, metrics: list[str]) -> Panel:
    return wr.BarPlot(title=title, metrics=[*metrics], orientation="h")


def _pictures(title: str, metrics: list[str]) -> Panel:
    return wr.MediaBrowser(title=title, media_keys=metrics, num_columns=2)


SECTIONS: dict[str, list[Show]] = {
    "Loss by tokens": [
        Show("Training loss", ["loss/train"], _curves(TOKENS)),
        Show("Validation loss", ["loss/valid"], _curves(TOKENS)),
        Show("Gradient norm", ["optim/grad_norm"], _curves(STEP)),
    ],
    "Speed": [
        Show("Tokens/s per GPU", ["throughput/tokens_per_sec_per_gpu"], _curves(STEP)),
        Show(
            "Tokens/s per GPU, median of the run",
            ["throughput/tokens_per_sec_per_gpu_median"],
            _bars,
        ),
        Show("TFLOP/s per GPU", ["throughput/tflops_per_gpu"], _curves(STEP)),
        Show("MFU, against the dense BF16 peak", ["throughput/mfu"], _curves(STEP)),
        Show("Step time, ms", ["time/step_ms"], _curves(STEP)),
        Show("Waiting for data, ms a step", ["time/data_ms"], _curves(STEP)),
        Show("Where a step's time goes, ms", STEP_PARTS, _bars),
    ],
    "Memory": [
        Show("Peak GPU memory allocated, GiB", ["memory/peak_allocated_gib"], _curves(STEP)),
        Show("Peak GPU memory reserved, GiB", ["memory/peak_reserved_gib"], _curves(STEP)),
        Show("Peak memory of the process, GiB", ["memory/peak_rss_gib"], _curves(STEP)),
        Show("Kept for backward, MiB a layer", ["moe/kept_mib"], _curves(STEP)),
    ],
    "FP8 scales and dispatch": [
        Show("Scale relayouts a layer, forward", ["moe/scale_relayouts"], _curves(STEP)),
        Show("Scale relayouts a layer, backward", ["moe/scale_relayouts_backward"], _curves(STEP)),
        Show("Dispatched, MiB a step", ["moe/dispatched_mib"], _curves(STEP)),
    ],
    "Routing": [
        Show("Expert load, a row per layer", ["moe/expert_load"], _pictures),
        Show("Busiest expert over the mean", ["moe/max_expert_load"], _curves(STEP)),
        Show("Largest bias of an expert", ["moe/expert_bias_max"], _curves(STEP)),
        Show(
            "Entropy: expert load and router",
            ["moe/load_entropy", "moe/router_entropy"],
            _curves(STEP),
        ),
        Show("Dropped copies of tokens, a step", ["moe/dropped_rows"], _curves(STEP)),
        Show("Room for rows, over the even share", ["moe/room"], _curves(STEP)),
        Show("Steps done again, of an interval", ["moe/redone_steps"], _curves(STEP)),
        Show("Steps without memory for room", ["moe/waited_steps"], _curves(STEP)),
    ],
}


def make_sections(logged: Collection[str] | None = None) -> dict[str, list[Panel]]:
    """Panels by section; with `logged`, only of metrics that are in it."""
    made: dict[str, list[Panel]] = {}
    for name, shows in SECTIONS.items():
        for show in shows:
            metrics = [m for m in show.metrics if logged is None or m in logged]
            if metrics:
                made.setdefault(name, []).append(show.draw(show.title, metrics))
    return made


def gap_panel(chart: str, baseline: str) -> Panel:
    """The gap to the baseline run: drawn by the chart preset `chart`, whose spec is `GAP_CHART`."""
    return wr.CustomChart(
        query={"history": {"keys": [TOKENS, "loss/train"]}},
        chart_name=chart,
        chart_fields={"tokens": TOKENS, "loss": "loss/train", "run": "name"},
        chart_strings={"baseline": baseline},
    )


# W&B fills in ${field:...} and ${string:...}, and hands over one row per run and logged step. A
# panel of W&B's own draws each run for itself, so the join of the runs has to be made here.
GAP_CHART: Spec = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
    "title": "Gap of the training loss to ${string:baseline}, %",
    "data": {"name": "wandb"},
    "transform": [
        {"calculate": "datum['${field:loss}']", "as": "loss"},
        {"calculate": "datum['${field:tokens}']", "as": "tokens"},
        {"calculate": "datum['${field:run}']", "as": "run"},
        {"filter": "isValid(datum.loss) && isValid(datum.tokens)"},
        {
            "calculate": "datum.run === '${string:baseline}' ? datum.loss : null",
            "as": "baseline_here",
        },
        {
            "joinaggregate": [{"op": "max", "field": "baseline_here", "as": "baseline"}],
            "groupby": ["tokens"],
        },
        {"filter": "isValid(datum.baseline)"},
        {"calculate": "100 * (datum.loss - datum.baseline) / datum.baseline", "as": "gap"},
    ],
    "mark": {"type": "line", "point": True},
    "encoding": {
        "x": across("tokens", "tokens"),
        "y": up("gap", "gap, %"),
        "color": {"field": "run", "type": "nominal"},
    },
}
