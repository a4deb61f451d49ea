"""The parts of the comparison's page that need no script: verdicts, table, what differs, origin."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from scripts.compare.arms import Arm
from scripts.compare.noise import FEWEST, RESAMPLES
from scripts.compare.page.html import NOTHING, Html, fill, join
from scripts.compare.reading import PERCENT, on_cpu, speed_verdicts
from scripts.compare.runs import (
    METRICS_FILE,
    ROUTING_FILE,
    TAIL,
    Run,
    config_differences,
    environment_differences,
)
from scripts.compare.table import Cell, Row

TABLE = """<div class="scroll"><table{style}><thead><tr><th scope="col">{corner}</th>{heads}</tr>\
</thead><tbody>{body}</tbody></table></div>"""
HEAD = '<th scope="col">{name}</th>'
LINE = '<tr><th scope="row">{name}</th>{cells}</tr>'
CELL = "<td>{value}</td>"
SMALL = "<small>{text}</small>"


def verdicts(runs: Sequence[Run], arms: Sequence[Arm], baseline: Arm) -> Html:
    """A card for each side: how fast, against the baseline, and whether that is noise. None where
    a CPU's speed would be the first thing that is read."""
    found = [] if on_cpu(runs) else speed_verdicts(arms, baseline)
    if not found:
        return NOTHING
    cards = []
    for verdict in found:
        ratio = verdict.ratio
        counted = (
            f"{len(verdict.arm.runs)} against {len(baseline.runs)} runs"
            if ratio.repeats > 1
            else "one run each"
            if len(verdict.arm.runs) == len(baseline.runs) == 1
            else "one side run once"
        )
        card = fill(
            '<article class="card"><h3>{dot}{name}</h3>'
            '<p class="big">{ratio:.3f}<small>x the speed of {base}</small></p>'
            '<p><span class="chip {kind}">{short}</span></p>'
            "<p class='small'>{percent} interval {low:.3f} to {high:.3f}; {counted}</p></article>",
            dot=dot(verdict.arm.runs[0]),
            name=verdict.arm.name,
            ratio=ratio.value,
            base=baseline.name,
            kind=ratio.verdict,
            short=verdict.short,
            percent=PERCENT,
            low=ratio.low,
            high=ratio.high,
            counted=counted,
        )
        cards.append(card)
    return fill(
        '<div class="cards">{cards}</div>{whiskers}',
        cards=join(cards),
        whiskers=_whiskers(arms, baseline),
    )


def _whiskers(arms: Sequence[Arm], baseline: Arm) -> Html:
    """Each ratio as a dot with its interval, on one axis on which 1 is the baseline."""
    found = speed_verdicts(arms, baseline)
    low = min(1.0, *(verdict.ratio.low for verdict in found))
    high = max(1.0, *(verdict.ratio.high for verdict in found))
    margin = max((high - low) * 0.12, 0.005)
    low, high = low - margin, high + margin

    def place(value: float) -> str:
        return f"{(value - low) / (high - low) * 100:.2f}%"

    rows = [
        fill(
            '<div class="whisker"><span>{name}</span>'
            '<div class="track" style="--run:var(--{path})">'
            '<i class="one" style="left:{one}"></i>'
            '<i class="span" style="left:{begin};width:{width:.2f}%"></i>'
            '<i class="dot" style="left:{value}"></i></div></div>',
            name=verdict.arm.name,
            path=verdict.arm.path,
            one=place(1),
            begin=place(verdict.ratio.low),
            width=(verdict.ratio.high - verdict.ratio.low) / (high - low) * 100,
            value=place(verdict.ratio.value),
        )
        for verdict in found
    ]
    ends = [
        fill('<span style="left:{place}">{label}</span>', place=place(value), label=label)
        for value, label in _axis_labels(low, high)
    ]
    return fill(
        '<div class="whiskers" role="img" aria-label="Ratios with their intervals">'
        '{rows}<div class="whisker"><span></span><div class="axis">{ends}</div></div>'
        "<p class='small'>Speed over that of {base}, whose own is the line at 1. "
        "The bar is the {percent} interval; a bar that touches the line is noise.</p></div>",
        rows=join(rows),
        ends=join(ends),
        base=baseline.name,
        percent=PERCENT,
    )


def _axis_labels(low: float, high: float) -> list[tuple[float, str]]:
    """1 and a few round values beside it."""
    step = next(
        s
        for s in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, math.inf)
        if (high - low) / s <= 5
    )
    if step == math.inf:
        return [(1.0, "1")]
    first, last = math.ceil((low - 1) / step), math.floor((high - 1) / step)
    return [(1 + n * step, f"{1 + n * step:.4g}") for n in range(first, last + 1)]


def table(runs: Sequence[Run], rows: Sequence[Row]) -> Html:
    heads = [fill(HEAD, name=fill("{dot}{name}", dot=dot(run), name=_name(run))) for run in runs]
    lines = [
        fill(
            LINE,
            name=fill("{label}<small>{source}</small>", label=row.label, source=row.source),
            cells=join(map(_cell, row.cells)),
        )
        for row in rows
    ]
    style = fill(' style="--runs:{count}"', count=len(runs))
    return fill(TABLE, style=style, corner="run", heads=join(heads), body=join(lines))


def _cell(cell: Cell) -> Html:
    spread = fill(SMALL, text=cell.spread) if cell.spread else NOTHING
    value = fill("{text}{spread}", text=_breakable(cell.text), spread=spread)
    return fill(CELL, value=value)


def _name(run: Run) -> Html:
    return _breakable(run.name)


def _breakable(name: str) -> Html:
    """Text that may break after an underscore."""
    return join(name.split("_"), Html("_<wbr>"))


def dot(run: Run) -> Html:
    return fill('<i class="swatch" style="background:var(--{path})"></i>', path=run.path)


def differences(runs: Sequence[Run]) -> Html:
    """Everything in which configs and environments differ, the expected included."""
    rows = [*environment_differences(runs), *config_differences(runs)]
    if not rows:
        return Html("<p>Config and environment are the same in all runs.</p>")
    lines = [
        fill(LINE, name=key, cells=join(fill(CELL, value=value) for value in values))
        for key, values in rows
    ]
    return fill(
        "{table}<p>All other keys of the configs, the versions and the commit are equal.</p>",
        table=fill(
            TABLE,
            style="",
            corner="key",
            heads=join(fill(HEAD, name=run.name) for run in runs),
            body=join(lines),
        ),
    )


def origin(runs: Sequence[Run], out: Path) -> Html:
    """The folder of each run, linked from the page's own, and what made it."""
    items = []
    for run in runs:
        files = []
        for name in ("config.yaml", METRICS_FILE, ROUTING_FILE, "environment.json"):
            path = run.folder / name
            if path.exists():
                link = os.path.relpath(path.resolve(), out.resolve()).replace(os.sep, "/")
                files.append(fill('<a href="{link}">{name}</a>', link=quote(link), name=name))
        made_by = [run.machine]
        if commit := run.environment.get("commit"):
            made_by.append(f"commit {commit}")
        versions = run.environment.get("versions")
        if isinstance(versions, dict):
            made_by.append(", ".join(f"{name} {version}" for name, version in versions.items()))
        item = fill(
            "<dt>{dot}{name}</dt><dd><code>{folder}</code>: {files}<br>{lines} lines of metrics, "
            "{measured} of them with a speed<br>{made_by}</dd>",
            dot=dot(run),
            name=run.name,
            folder=run.folder,
            files=join(files, Html(", ")),
            lines=len(run.rows),
            measured=len(run.finite("throughput/tokens_per_sec")),
            made_by="; ".join(made_by),
        )
        items.append(item)
    return fill("<dl>{items}</dl>", items=join(items))


def method(runs: Sequence[Run], baseline: Arm) -> Html:
    shortest = min((len(run.finite("throughput/tokens_per_sec")) for run in runs), default=0)
    return fill(
        """<p><b>Speed</b> is tokens/s over a logging interval: wall time, without the
first <code>train.warmup_steps</code> steps, validation and checkpoints. A run's speed is the median
of its intervals ({shortest} in the shortest run); the spread under a figure is the middle half of
them.</p>
<p><b>Noise.</b> A ratio of speeds comes with a {percent} interval. If it holds 1, the difference
is inside the noise. Where both sides were run more than once, a run counts as one measurement, its
median, and the interval is Student's (Welch). Otherwise the logging intervals of both sides are
drawn again {resamples:,} times, in blocks of neighbours, because neighbours share a cause. Fewer
than {fewest} intervals say nothing. The ratio of repeats is that of their geometric means.</p>
<p><b>Loss.</b> A final training loss is the mean over the last {tail:.0%} of the logged steps. The
gap is (loss &minus; baseline's loss) / baseline's loss, of such means at the steps that both have
logged; the baseline is {base}. Its interval draws blocks of those steps again.
Repeats are compared with the baseline's run of the same seed.</p>
<p><b>Relayouts.</b> A relayout is a pass whose only work is to re-arrange FP8 scales; it is counted
per MoE layer and step. <b>Peak memory</b> is the largest of rank 0.</p>""",
        shortest=shortest,
        percent=PERCENT,
        resamples=RESAMPLES,
        fewest=FEWEST,
        tail=TAIL,
        base=baseline.name,
    )


def summary(runs: Sequence[Run]) -> str:
    """One line about what was trained where."""
    first = runs[0]
    machines = list(dict.fromkeys(run.machine for run in runs))
    return " · ".join(
        (
            f"experiment {first.config.run.group or 'without a name'}",
            " and ".join(machines),
            f"{max(run.rows[-1]['progress/step'] for run in runs):,} steps",
            f"{max(run.rows[-1].get('progress/tokens', 0) for run in runs):,.0f} tokens",
        )
    )
