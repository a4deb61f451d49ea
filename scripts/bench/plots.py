"""The picture of a training benchmark: TFLOP/s per GPU, ours against stock, with their spread.

    python -m scripts.bench.plots docs/results/train_NAME.json [--picture FILE.svg]

A bar is the median over the repeats, its whisker goes from the slowest to the fastest.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.bench.tables import best_stock, failure, machine_name, training_name

OURS, STOCK = "#0072B2", "#8A8A94"
IMAGES = Path(__file__).parents[2] / "docs" / "images"


def plot(source: Path, picture: Path) -> None:
    """Draw the results file: a panel per micro-batch, a bar per row.

    Raises ValueError if it has nothing to draw.
    """
    result = json.loads(source.read_text(encoding="utf-8"))
    rows = result["rows"]
    measured = [row for row in rows if "step_ms" in row]
    if not measured:
        raise ValueError(f"{source} has no measurements")
    sizes = list(dict.fromkeys(row["micro_batch"] for row in measured))
    panels = [[row for row in rows if row["micro_batch"] == size] for size in sizes]
    heights = [len(panel) for panel in panels]
    # Text stays text, and the same figures give the same file.
    with mpl.rc_context({"svg.hashsalt": source.stem, "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 1.1 + 0.34 * sum(heights) + 0.4 * len(panels)))
        figure.set_layout_engine("constrained")
        figure.set_facecolor("white")  # on a dark page too
        all_axes = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, height_ratios=heights
        )[:, 0]
        for axes, panel, size in zip(all_axes, panels, sizes, strict=True):
            _draw(axes, panel)
            axes.set_title(f"micro-batch {size}", fontsize=9, loc="left")
            if stock := best_stock(rows, size):
                axes.axvline(
                    stock["tflops_per_gpu"]["median"], color="#333333", lw=1, ls=":", zorder=0
                )
        most = max(row["tflops_per_gpu"]["max"] for row in measured)
        all_axes[-1].set_xlim(0, most * 1.12)
        dotted = any(row["stack"] != "ours" for row in measured)
        all_axes[-1].set_xlabel(
            f"TFLOP/s per GPU, {machine_name(result)}" + ("; dotted: best stock" if dotted else "")
        )
        picture.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Description": _mark(source)} if picture.suffix == ".svg" else None
        figure.savefig(picture, dpi=150, metadata=about)


def _draw(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for place, row in enumerate(rows):
        if "step_ms" not in row:
            axes.text(0, place, f" {failure(row)}", va="center", fontsize=8.5, color="#9b2c1f")
            continue
        speed = row["tflops_per_gpu"]
        reach = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
        axes.barh(
            place, speed["median"], height=0.72, color=OURS if row["stack"] == "ours" else STOCK,
            xerr=reach, error_kw={"ecolor": "black", "elinewidth": 1.2, "capsize": 3},
        )  # fmt: skip
        label = f"{speed['median']:,.1f}"
        axes.annotate(
            label, (speed["max"], place), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=8.5, bbox={"color": "white", "pad": 0.5},
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [training_name(row) for row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)


def alt_text(result: dict[str, Any]) -> str:
    """The picture in words: the fastest of ours, and of stock at the same micro-batch."""
    rows = result["rows"]
    ours = [row for row in rows if row["stack"] == "ours" and "step_ms" in row]
    best = max(ours, key=lambda row: row["tflops_per_gpu"]["median"], default=None)
    stock = best_stock(rows, (best or rows[0])["micro_batch"])
    said = [
        f"{training_name(row)} {row['tflops_per_gpu']['median']:,.1f}"
        for row in (best, stock)
        if row
    ]
    return f"TFLOP/s per GPU of training steps, the fastest: {', '.join(said)}"


def is_picture_of(picture: Path, source: Path) -> bool:
    """Whether the picture was drawn from the file as it is now."""
    return picture.exists() and _mark(source) in picture.read_text(encoding="utf-8")


def _mark(source: Path) -> str:
    return f"{source.name} sha256 {hashlib.sha256(source.read_bytes()).hexdigest()}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.plots")
    parser.add_argument("results", type=Path, help="docs/results/train_NAME.json")
    parser.add_argument("--picture", type=Path, help="default: docs/images/train_NAME.svg")
    options = parser.parse_args(arguments)
    picture = options.picture or IMAGES / f"{options.results.stem}.svg"
    try:
        plot(options.results, picture)
    except KeyError as error:
        print(f"plot_train: {options.results} lacks {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"plot_train: {error}", file=sys.stderr)
        return 2
    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
