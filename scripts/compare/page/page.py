"""The page of a comparison: one file, nothing from the network.

What needs no script is HTML from `sections.py` and `parts.py`. The curves are drawn by Vega-Lite,
which is put into the page with the specification of `interaction.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import vl_convert

from scripts.compare.arms import Arm
from scripts.compare.colors import COLORS
from scripts.compare.page import parts, sections
from scripts.compare.page.html import Html, fill, join
from scripts.compare.page.interaction import make_charts
from scripts.compare.reading import reading, warnings
from scripts.compare.runs import Run
from scripts.compare.table import Row

HERE = Path(__file__).parent

TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'">
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
<p class="small">Point at a chart to read it, or move the slider; untick a run to hide it; drag to
zoom, double-click to see all.</p>
<div id="charts"></div>
<noscript><p class="warn">The curves need JavaScript; compare.png shows the losses without
it.</p></noscript></section>
{breakdown}
{routing}
<section id="differences"><h2>What differs between the runs</h2>
{differences}</section>
<section id="method"><h2>How it is counted</h2>{method}</section>
<section id="origin"><h2>Where it comes from</h2>{origin}</section>
<script type="application/json" id="specification">{charts}</script>
<script>
{script}</script>
</body></html>
"""


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
    # A name must not end the script that it is in.
    charts = json.dumps(make_charts(runs, baseline), allow_nan=False).replace("<", "\\u003c")
    return fill(
        TEMPLATE,
        title=" / ".join(dict.fromkeys(run.path for run in runs)),
        css=Html(path_colors() + run_colors(runs) + css),
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
        charts=Html(charts),
        script=Html(vl_convert.javascript_bundle(script)),
    )


def path_colors() -> str:
    """CSS: each path's colour as a variable of its name, on a light and on a dark screen."""
    light = " ".join(f"--{path}: {color.light};" for path, color in COLORS.items())
    dark = " ".join(f"--{path}: {color.dark};" for path, color in COLORS.items())
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def run_colors(runs: Sequence[Run]) -> str:
    """CSS: the colour of the run that a control is for, as --run."""
    return "".join(
        f"#legend > :nth-child({place}) {{ --run: var(--{run.path}) }}\n"
        for place, run in enumerate(runs, start=1)
    )
