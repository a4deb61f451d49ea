"""The page of a comparison: one file, nothing from the network.

What needs no script is HTML from `sections.py` and `parts.py`. `page.js` draws the curves from the
data that is put into the page. The drawing is our own, since it is little, and a charting library
inside every page would be much.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from scripts.compare.arms import Arm
from scripts.compare.colors import COLORS, WIDE
from scripts.compare.page import parts, sections
from scripts.compare.page.html import Html, fill, join
from scripts.compare.reading import on_cpu, partner, reading, warnings
from scripts.compare.runs import Run
from scripts.compare.table import Row

HERE = Path(__file__).parent

Values = dict[int, float]
"""By step."""


TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
{css}</style></head><body>
<h1>Runs compared: {title}</h1>
<p class="sub">{summary}</p>
<p>A path is how tokens get from the router to their experts: in BF16, or in FP8 with scales that
are re-arranged (a relayout) more or less often.</p>
{notes}
{verdicts}
<section id="reading"><h2>What it says</h2><ul>{said}</ul></section>
<section id="figures"><h2>Figures</h2>
<p>Each is made from the metric named beside it, in the run's metrics.jsonl. Below a median stands
the middle half of the logged steps.</p>{table}</section>
<section id="curves"><h2>Curves</h2>
<div class="controls"><span id="legend" class="controls"></span>
<span id="tools" class="controls"></span></div>
<p class="small">Point at a curve to read it, click a run to hide it, drag to zoom.</p>
<div id="charts" class="charts"></div>
<noscript><p class="warn">The curves need JavaScript; compare.png shows the losses without
it.</p></noscript></section>
{breakdown}
{routing}
<section id="differences"><h2>What differs between the runs</h2>
{differences}</section>
<section id="method"><h2>How it is counted</h2>{method}</section>
<section id="origin"><h2>Where it comes from</h2>{origin}</section>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body></html>
"""


class Curve(TypedDict):
    """A run as `page.js` knows it, with its x values."""

    index: int
    name: str
    path: str
    step: list[int]
    tokens: list[float | None]
    repeat: int
    """How many runs of the same path come before it."""
    under: bool
    """Drawn wide, below the others."""


class Chart(TypedDict):
    """What is drawn in one pair of axes: y values for each run."""

    title: str
    unit: str
    zero: bool
    """Whether there is a line at 0."""
    series: list[list[float | None]]
    dots: NotRequired[list[list[float | None]]]


class Data(TypedDict):
    """What the page's script draws."""

    runs: list[Curve]
    charts: list[Chart]


def make_html(
    runs: Sequence[Run], arms: Sequence[Arm], baseline: Arm, rows: Sequence[Row], out: Path
) -> Html:
    """The page, to be written into the folder `out`, from which it links to the runs' files."""
    css = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    space = Html("&nbsp;%")
    said = (
        fill("<li>{line}</li>", line=join(line.split(" %"), space))
        for line in reading(runs, arms, baseline)
    )
    # A name must not end the script that the data is in.
    data = json.dumps(make_data(runs, baseline), allow_nan=False).replace("<", "\\u003c")
    return fill(
        TEMPLATE,
        title=" / ".join(dict.fromkeys(run.path for run in runs)),
        css=Html(path_colors() + css),
        summary=sections.summary(runs),
        notes=join(fill('<p class="warn">{note}</p>', note=note) for note in warnings(runs)),
        verdicts=sections.verdicts(runs, arms, baseline),
        said=join(said),
        table=sections.table(runs, rows),
        breakdown=parts.breakdown(runs),
        routing=parts.routing(runs),
        differences=sections.differences(runs),
        method=sections.method(runs, baseline),
        origin=sections.origin(runs, out),
        data=Html(data),
        script=Html(script),
    )


def path_colors() -> str:
    """CSS: each path's colour as a variable of its name, on a light and on a dark screen."""
    light = " ".join(f"--{path}: {color.light};" for path, color in COLORS.items())
    dark = " ".join(f"--{path}: {color.dark};" for path, color in COLORS.items())
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def make_data(runs: Sequence[Run], baseline: Arm) -> Data:
    """Lists of one run are equally long; None stands where a step has no value, or none that is
    finite.
    """
    steps = [[row["progress/step"] for row in run.rows] for run in runs]

    def gaps(run: Run) -> Values:
        ours, theirs = run.series("loss/train"), partner(run, baseline).series("loss/train")
        return {
            step: (loss - theirs[step]) / theirs[step] * 100
            for step, loss in ours.items()
            if theirs.get(step)
        }

    def metric(name: str) -> Callable[[Run], Values]:
        return lambda run: run.series(name)

    emulated = " (CPU, emulated)" if on_cpu(runs) else ""
    wanted: list[tuple[str, str, Callable[[Run], Values]]] = [
        ("Training loss", "", metric("loss/train")),
        (f"Gap of the training loss to {baseline.name}, %", " %", gaps),
        (f"Tokens per second{emulated}", "", metric("throughput/tokens_per_sec")),
        ("Peak GPU memory, GiB", " GiB", metric("memory/peak_allocated_gib")),
        ("Busiest expert over the mean", "", metric("moe/max_expert_load")),
        ("Gradient norm", "", metric("optim/grad_norm")),
    ]
    charts: list[Chart] = []
    for title, unit, values in wanted:
        if len(runs) == 1 and values is gaps:
            continue
        found = [values(run) for run in runs]
        if not any(map(math.isfinite, (v for one in found for v in one.values()))):
            continue
        chart: Chart = {
            "title": title,
            "unit": unit,
            "zero": values is gaps,
            "series": _lists(found, steps),
        }
        if title == "Training loss":
            valid = [run.series("loss/valid") for run in runs]
            if any(valid):
                chart["title"] = "Training loss (dots: validation)"
                chart["dots"] = _lists(valid, steps)
        charts.append(chart)
    described: list[Curve] = []
    for index, run in enumerate(runs):
        tokens = run.series("progress/tokens")
        described.append(
            {
                "index": index,
                "name": run.name,
                "path": run.path,
                "step": steps[index],
                "tokens": [_number(tokens.get(step, math.nan)) for step in steps[index]],
                "repeat": sum(other.path == run.path for other in runs[:index]),
                "under": run.path == WIDE,
            }
        )
    return {"runs": described, "charts": charts}


def _lists(found: Sequence[Values], steps: Sequence[Sequence[int]]) -> list[list[float | None]]:
    return [
        [_number(values.get(step, math.nan)) for step in own]
        for values, own in zip(found, steps, strict=True)
    ]


def _number(value: float) -> float | None:
    """Seven digits are more than a screen shows; tokens are whole. JSON has no NaN."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.7g}")
