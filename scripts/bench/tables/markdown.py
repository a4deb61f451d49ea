"""Cells and lines of Markdown tables."""

from collections.abc import Sequence

from scripts.bench.results import Spread

ABSENT = "–"  # noqa: RUF001


def span(figure: Spread, form: str) -> str:
    """The median, and from where to where the measurements went."""
    low, high = form.format(figure["min"]), form.format(figure["max"])
    middle = form.format(figure["median"])
    return middle if low == high else f"{middle} [{low} to {high}]"


def largest(figure: Spread | None) -> str:
    return ABSENT if figure is None else f"{figure['max']:.1f}"


def table(head: list[str], body: Sequence[list[str]], left: int = 1) -> list[str]:
    """Lines of Markdown, the first `left` columns as text; columns without a figure left out."""
    kept = [i for i in range(len(head)) if i < left or any(row[i] != ABSENT for row in body)]
    rule = ["---" if i < left else "---:" for i in kept]
    lines = [_line([row[i] for i in kept]) for row in (head, *body)]
    return [lines[0], _line(rule), *lines[1:]]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
