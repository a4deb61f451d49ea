"""Render the tables of the README and the docs from `docs/results/`, between markers.

    python -m scripts.readme_tables            # write
    python -m scripts.readme_tables --check    # say what is out of date, write nothing

A table stands between two lines, and is made anew each time, so a figure is never typed:

    <!-- table: train_moe_small.json -->
    <!-- end of table -->

What it looks like follows from the file: `train_*.json` (speeds by path, as the benchmark of whole
training steps writes them), or a `compare.json` of `python -m scripts.compare`.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
TEXTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

BLOCK = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

ABSENT = "–"  # noqa: RUF001

COMPARED = (
    "final train loss",
    "final valid loss",
    "loss gap to bf16",
    "relayouts/layer, forward",
    "relayouts/layer, backward",
    "kept for backward, MiB/layer",
    "dispatched MiB/step",
)
"""Of a comparison made on a CPU, what holds on any machine."""


class InputError(Exception):
    """Bad input; its text is the one line to print."""


def render(path: Path) -> str:
    """A results file as a Markdown table and a line about where it comes from."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    try:
        rows = result["rows"]
        if rows and "stack" in rows[0]:
            lines = _training(rows)
        elif rows and "run" in rows[0]:
            lines = _comparison(rows)
        else:
            raise InputError(f"{path}: its rows have neither stack nor run; no table is known")
        return "\n".join([*lines, "", _origin(path, result), ""])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks {error}") from None


def _training(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Speed of whole training steps, a row per stack, path and number of GPUs."""
    lines = _head(
        (
            *("", "GPUs", "micro-batch", "ms a step", "tokens/s/GPU", "TFLOP/s/GPU", "peak GiB"),
            "speed / bf16",
        )
    )
    for row in rows:
        first = (_training_name(row), str(row["gpus"]), str(row["micro_batch"]))
        if row.get("error"):  # such as out of memory: that is a result too
            lines.append(_line([*first, row["error"], *[ABSENT] * 4]))
            continue
        same = (
            other
            for other in rows
            if other["path"] == "bf16"
            and not other.get("flags")
            and not other.get("error")
            and all(other[key] == row[key] for key in ("stack", "gpus", "micro_batch"))
        )
        base = next(same, None)
        speed = row["tokens_per_sec_per_gpu"]
        ratio = speed["median"] / base["tokens_per_sec_per_gpu"]["median"] if base else None
        peak = row.get("peak_allocated_gib")
        cells = (
            *first,
            _spread(row["step_ms"], "{:,.1f}"),
            _spread(speed, "{:,.0f}"),
            _spread(row["tflops_per_gpu"], "{:,.0f}"),
            ABSENT if peak is None else f"{peak['max']:.1f}",
            ABSENT if ratio is None else f"{ratio:.3f}",
        )
        lines.append(_line(cells))
    return lines


def _training_name(row: dict[str, Any]) -> str:
    """The path, the stack if it is not ours, and what was set apart from others."""
    parts = [f"`{row['path']}`"]
    if row["stack"] != "ours":
        parts.insert(0, row["stack"])
    if operations := row.get("operations"):
        parts.append(f"operations {operations}")
    parts += row.get("flags", [])
    return ", ".join(parts)


def _spread(figure: dict[str, float], form: str) -> str:
    """The median, and from where to where the measurements went."""
    low, high = form.format(figure["min"]), form.format(figure["max"])
    middle = form.format(figure["median"])
    return middle if low == high else f"{middle} ({low} to {high})"


def _comparison(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A row per figure, a column per run."""
    lines = _head(["", *(f"`{row['path']}`" for row in rows)])
    for label in COMPARED:
        if any(label in row for row in rows):
            lines.append(_line([label, *(row.get(label, ABSENT) for row in rows)]))
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---", *("---:" for _ in names[1:])])]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(path: Path, result: dict[str, Any]) -> str:
    machine = result["machine"]
    if isinstance(machine, dict):
        machine = f"{machine['devices']} x {machine['device_name']}"
    versions = result.get("versions") or {}
    names = ("torch", "transformer-engine", "megatron-core")
    said = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    commit = result.get("commit") or "not known"
    return f"{machine}; {said}; commit {commit}; [{path.name}](RESULTS/{path.name})"


def update(text: str, folder: Path, beside: Path) -> str:
    """`text`, which stands in the folder `beside`, with every table made anew."""
    for mark in ("<!-- table:", "<!-- end of table"):
        if text.count(mark) != len(BLOCK.findall(text)):
            raise InputError(f"a line with {mark} has no partner, or is misspelt")
    link = Path("docs/results" if beside == ROOT else "results").as_posix()

    def fill(found: re.Match[str]) -> str:
        table = render(folder / found["name"]).replace("(RESULTS/", f"({link}/")
        return f"{found[1]}{table}{found[3]}"

    return BLOCK.sub(fill, text)


def main(arguments: Sequence[str] | None = None, texts: Sequence[Path] = TEXTS) -> int:
    """Returns the exit status: 0, 1 if --check finds an old table, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.readme_tables",
        description="Render the tables of the README and the docs from docs/results/.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    status = 0
    for path in texts:
        old = path.read_text(encoding="utf-8")
        try:
            new = update(old, options.results, path.parent)
        except InputError as error:
            print(f"readme_tables: {path.name}: {error}", file=sys.stderr)
            return 2
        if new == old:
            continue
        if options.check:
            print(f"{path.name}: its tables are not those of {options.results}", file=sys.stderr)
            status = 1
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{path.name}: tables written")
    return status


if __name__ == "__main__":
    sys.exit(main())
