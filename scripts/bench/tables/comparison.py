"""Compared runs as a Markdown table: the file that `scripts.compare` writes."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from scripts.bench.results import Row
from scripts.bench.tables.markdown import ABSENT, table

COMPARED = (
    "computed in",
    "final train loss",
    "final valid loss",
    "train loss gap to bf16",
    "relayouts/layer, forward",
    "relayouts/layer, backward",
    "kept for backward, MiB/layer",
    "dispatched MiB/step",
)
"""Rows of a comparison that hold on any machine."""


def comparison_table(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """A column a run; with repeats a row a configuration, whose losses and loads are their mean."""
    if has_repeats(shown):
        return _repeated(shown)
    body = [
        [label, *(row.get(label, ABSENT) for row in shown)]
        for label in COMPARED
        if any(label in row for row in shown)
    ]
    paths = [row["path"] for row in shown]
    names = [row["path"] if paths.count(row["path"]) == 1 else row["run"] for row in shown]
    return table(["", *(f"`{name}`" for name in names)], body)


REPEATED = {
    "final train loss": "{:.3f}",
    "final valid loss": "{:.3f}",
    "busiest expert / mean": "{:.2f}",
    "worst busiest expert / mean": "{:.2f}",
    "final busiest expert / mean": "{:.2f}",
    "final load entropy": "{:.3f}",
}
"""Columns of a comparison of repeats."""


def has_repeats(shown: Sequence[Row]) -> bool:
    """Whether runs of one configuration are among these rows of a comparison."""
    names = [row["arm"] for row in shown if "arm" in row]
    return len(set(names)) < len(names)


def repeats(shown: Sequence[Row]) -> Iterable[int]:
    """Runs of each configuration."""
    return Counter(row["arm"] for row in shown).values()


def _repeated(shown: Sequence[Row]) -> list[str]:
    """A row per configuration, named by the keys that tell them apart."""
    sides: dict[str, list[Row]] = {}
    for row in shown:
        sides.setdefault(row["arm"], []).append(row)
    keys = list(shown[0]["differs"]) or ["run"]  # nothing, where all are repeats of one
    body = []
    for runs in sides.values():
        figures = [
            _mean([run[label] for run in runs if run.get(label, ABSENT) != ABSENT], form)
            for label, form in REPEATED.items()
        ]
        named = {"run": f"{len(runs)} runs", **runs[0]["differs"]}
        body.append([*(str(named[key]) for key in keys), *figures])
    return table([*(f"`{key}`" for key in keys), *REPEATED], body, left=len(keys))


def _mean(figures: Sequence[str], form: str) -> str:
    """Of one figure of several runs, and from where to where it went."""
    if not figures:
        return ABSENT
    try:
        values = [float(text) for text in figures]
    except ValueError:
        return "not finite"  # of a run that diverged
    mean, low, high = map(form.format, (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} [{low} to {high}]"
