"""The table of a comparison on a terminal. No cell wraps, however narrow the terminal is."""

import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scripts.compare.runs import Run
from scripts.compare.table import Row

GAP = 2
"""Columns of the terminal between two columns of the table."""


def print_table(console: Console, runs: Sequence[Run], table: Sequence[Row]) -> None:
    """Print a row per figure and a column per run.

    Where that is too wide, headings break after `_`, `-` and `.`, and cells that have a short form
    take it. Where it is still too wide, the runs are split into several tables.
    """
    names = [run.name for run in runs]
    headings = names
    cells = [[cell.text for cell in row.cells] for row in table]
    labels = [row.label for row in table]
    if _width(labels, headings, cells) > console.width:
        headings = [broken(name, 8) for name in names]
        cells = [[cell.short or cell.text for cell in row.cells] for row in table]
        if labels[0] == "path" and cells[0] == names:  # the headings say it already
            labels, cells = labels[1:], cells[1:]
    begin = 0
    while begin < len(runs):
        end = len(runs)
        while end > begin + 1 and _width(labels, headings, cells, begin, end) > console.width:
            end -= 1
        shown = Table(
            box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True, padding=(0, 1)
        )
        shown.add_column("run", no_wrap=True, vertical="bottom")
        for heading in headings[begin:end]:
            # A single run that is wider than the terminal is folded rather than cut off.
            shown.add_column(Text(heading), justify="right", overflow="fold", vertical="bottom")
        for label, row in zip(labels, cells, strict=True):
            shown.add_row(Text(label), *map(Text, row[begin:end]))
        console.print(shown)
        console.print()
        begin = end


def broken(name: str, width: int) -> str:
    """The name in lines of at most `width` characters, as far as its `_`, `-` and `.` allow."""
    lines = [""]
    for part in re.findall(r"[^_.-]*[_.-]+|[^_.-]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _width(
    labels: Sequence[str],
    headings: Sequence[str],
    cells: Sequence[Sequence[str]],
    begin: int = 0,
    end: int | None = None,
) -> int:
    """Columns of the terminal that a table of some of the runs takes."""
    width = max(map(cell_len, labels))
    for number, heading in list(enumerate(headings))[begin:end]:
        texts = [*heading.split("\n"), *(row[number] for row in cells)]
        width += GAP + max(map(cell_len, texts))
    return width
