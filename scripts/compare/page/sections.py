"""The parts of the comparison's page that need no script: verdicts, table, what differs, origin."""

import html
import math
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from scripts.compare.arms import Arm
from scripts.compare.noise import FEWEST, RESAMPLES
from scripts.compare.reading import PERCENT, on_cpu, speed_verdicts
from scripts.compare.runs import (
    METRICS_FILE,
    ROUTING_FILE,
    TAIL,
    Run,
    config_differences,
    environment_differences,
)
from scripts.compare.table import Row


def text(value: object) -> str:
    """Escaped, for between tags and inside attributes."""
    return html.escape(str(value))


def verdicts(runs: Sequence[Run], arms: Sequence[Arm], baseline: Arm) -> str:
    """A card for each arm: how fast, against the baseline, and whether that is noise."""
    found = speed_verdicts(arms, baseline)
    if not found:
        return ""
    emulated = on_cpu(runs)
    cards = []
    for verdict in found:
        ratio = verdict.ratio
        kind = "none" if emulated else ratio.verdict
        short = "says nothing about GPUs" if emulated else verdict.short
        chip = f'<span class="chip {kind}">{text(short)}</span>'
        interval = f"{PERCENT} interval {ratio.low:.3f} to {ratio.high:.3f}"
        counted = (
            f"{len(verdict.arm.runs)} against {len(baseline.runs)} runs"
            if ratio.repeats > 1
            else "one run each"
            if len(verdict.arm.runs) == len(baseline.runs) == 1
            else "one side run once"
        )
        cards.append(
            f'<article class="card{" muted" if emulated else ""}">'
            f"<h3>{dot(verdict.arm.runs[0])}{text(verdict.arm.name)}</h3>"
            f'<p class="big">{ratio.value:.3f}<small>x the speed of {text(baseline.name)}'
            f"{' (CPU)' if emulated else ''}</small></p>"
            f"<p>{chip}</p><p class='small'>{interval}; {counted}</p></article>"
        )
    return f'<div class="cards">{"".join(cards)}</div>{_whiskers(arms, baseline)}'


def _whiskers(arms: Sequence[Arm], baseline: Arm) -> str:
    """Each ratio as a dot with its interval, on one axis on which 1 is the baseline."""
    found = speed_verdicts(arms, baseline)
    low = min(1.0, *(verdict.ratio.low for verdict in found))
    high = max(1.0, *(verdict.ratio.high for verdict in found))
    margin = max((high - low) * 0.12, 0.005)
    low, high = low - margin, high + margin

    def place(value: float) -> str:
        return f"{(value - low) / (high - low) * 100:.2f}%"

    rows = []
    for verdict in found:
        ratio = verdict.ratio
        width = (ratio.high - ratio.low) / (high - low) * 100
        rows.append(
            f'<div class="whisker"><span>{text(verdict.arm.name)}</span>'
            f'<div class="track" style="--run:var(--{verdict.arm.path})">'
            f'<i class="one" style="left:{place(1)}"></i>'
            f'<i class="span" style="left:{place(ratio.low)};width:{width:.2f}%"></i>'
            f'<i class="dot" style="left:{place(ratio.value)}"></i></div></div>'
        )
    ends = "".join(
        f'<span style="left:{place(value)}">{label}</span>'
        for value, label in _axis_labels(low, high)
    )
    return (
        f'<div class="whiskers" role="img" aria-label="Ratios with their intervals">'
        f'{"".join(rows)}<div class="whisker"><span></span><div class="axis">{ends}</div></div>'
        f"<p class='small'>Speed over that of {text(baseline.name)}, whose own is the line at 1. "
        f"The bar is the {PERCENT} interval; a bar that touches the line is noise.</p></div>"
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


def table(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    heads = "".join(f'<th scope="col">{_name(run)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{text(row.label)}<small>{text(row.source)}</small></th>'
        + "".join(
            f"<td>{_breakable(cell.text)}"
            + (f"<small>{text(cell.spread)}</small>" if cell.spread else "")
            + "</td>"
            for cell in row.cells
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table style="--runs:{len(runs)}"><thead><tr>'
        f'<th scope="col">run</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _name(run: Run) -> str:
    return dot(run) + _breakable(run.name)


def _breakable(name: str) -> str:
    """Text that may break after an underscore."""
    return text(name).replace("_", "_<wbr>")


def dot(run: Run) -> str:
    return f'<i class="swatch" style="background:var(--{run.path})"></i>'


def differences(runs: Sequence[Run]) -> str:
    """Everything in which configs and environments differ, the expected included."""
    rows = [*environment_differences(runs), *config_differences(runs)]
    if not rows:
        return "<p>Config and environment are the same in all runs.</p>"
    heads = "".join(f'<th scope="col">{text(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{text(key)}</th>'
        + "".join(f"<td>{text(value)}</td>" for value in values)
        + "</tr>"
        for key, values in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">key</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div><p>All other keys of the configs, the versions and "
        "the commit are equal.</p>"
    )


def origin(runs: Sequence[Run], out: Path) -> str:
    """The folder of each run, linked from the page's own, and what made it."""
    items = []
    for run in runs:
        files = []
        for name in ("config.yaml", METRICS_FILE, ROUTING_FILE, "environment.json"):
            path = run.folder / name
            if path.exists():
                link = os.path.relpath(path.resolve(), out.resolve()).replace(os.sep, "/")
                files.append(f'<a href="{text(quote(link))}">{name}</a>')
        parts = [run.machine]
        if commit := run.environment.get("commit"):
            parts.append(f"commit {commit}")
        versions = run.environment.get("versions")
        if isinstance(versions, dict):
            parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
        measured = len(run.finite("throughput/tokens_per_sec"))
        items.append(
            f"<dt>{dot(run)}{text(run.name)}</dt><dd><code>{text(run.folder)}</code>: "
            f"{', '.join(files)}<br>{len(run.rows)} lines of metrics, {measured} of them with a "
            f"speed<br>{text('; '.join(parts))}</dd>"
        )
    return f"<dl>{''.join(items)}</dl>"


def method(runs: Sequence[Run], baseline: Arm) -> str:
    shortest = min((len(run.finite("throughput/tokens_per_sec")) for run in runs), default=0)
    return f"""<p><b>Speed</b> is tokens/s over a logging interval: wall time, without the
first <code>train.warmup_steps</code> steps, validation and checkpoints. A run's speed is the median
of its intervals ({shortest} in the shortest run); the spread under a figure is the middle half of
them.</p>
<p><b>Noise.</b> A ratio of speeds comes with a {PERCENT} interval. If it holds 1, the difference
is inside the noise. Where both sides were run more than once, a run counts as one measurement, its
median, and the interval is Student's (Welch). Otherwise the logging intervals of both sides are
drawn anew {RESAMPLES:,} times, in blocks of neighbours, because neighbours share a cause. Fewer
than {FEWEST} intervals say nothing. The ratio of repeats is that of their geometric means.</p>
<p><b>Loss.</b> A final training loss is the mean over the last {TAIL:.0%} of the logged steps. The
gap is (loss &minus; baseline's loss) / baseline's loss, of such means at the steps that both have
logged; the baseline is {text(baseline.name)}. Its interval draws blocks of those steps anew.
Repeats are held against the baseline's run of the same seed.</p>
<p><b>Relayouts.</b> A relayout is a pass whose only work is to re-arrange FP8 scales; it is counted
per MoE layer and step. <b>Peak memory</b> is the largest of rank 0.</p>"""


def summary(runs: Sequence[Run]) -> str:
    """One line about what was trained where."""
    first = runs[0]
    machines = list(dict.fromkeys(run.machine for run in runs))
    parts = [
        f"experiment {first.config.run.group or 'without a name'}",
        " and ".join(machines),
        f"{max(run.rows[-1]['progress/step'] for run in runs):,} steps",
        f"{max(run.rows[-1].get('progress/tokens', 0) for run in runs):,.0f} tokens",
    ]
    return text(" · ".join(parts))
