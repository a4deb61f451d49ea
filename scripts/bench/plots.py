"""The picture of a results file, of training steps or of one MoE layer.

    python -m scripts.bench.plots docs/results/train_NAME.json [--picture FILE.svg]
    python -m scripts.bench.plots docs/results/moe_layer.json

Training steps: TFLOP/s per GPU, ours against stock. A bar is the median over the repeats, its
whisker goes from the slowest to the fastest. One layer: where its time goes, by path.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scripts.bench.results import Result, Row, rows_to_show
from scripts.bench.tables import best_stock, failure, machine_name, training_name

OURS, STOCK = "#0072B2", "#8A8A94"
PART_COLORS = {
    "quantize": "#4e79a7",
    "dispatch": "#76b7b2",
    "wrap": "#bab0ac",  # in results from before it was no part any more: it moves nothing
    "permute": "#a0cbe8",
    "up_projection": "#59a14f",
    "relayout": "#e15759",  # the subject: the only red
    "swiglu": "#edc948",
    "down_projection": "#8cd17d",
    "combine": "#499894",
    "dgrad": "#b6992d",
    "wgrad": "#9c755f",
    "quantize_weights": "#b07aa1",
    "other": "#d7d7d7",
}
"""Parts of a layer as `train/profiling/moe.py` names them, in the order of a bar's pieces."""
IMAGES = Path(__file__).parents[2] / "docs" / "images"


def plot(source: Path, picture: Path) -> None:
    """Draw the results file `source` into `picture`. Raises ValueError where nothing is to draw."""
    result: Result = json.loads(source.read_text(encoding="utf-8"))
    is_training = any("step_ms" in row for row in rows_to_show(result))
    if is_training:
        figure = _training(result)
    elif any("forward_parts_ms" in row for row in result["rows"]):
        figure = _layer(result)
    else:
        raise ValueError(f"{source} has no measurements of training steps or of a layer")
    about: dict[str, str | None] = {"Date": None}
    if is_training:
        about["Description"] = _mark(source)
    picture.parent.mkdir(parents=True, exist_ok=True)
    fonts = "none" if is_training else "path"  # none: text stays text
    # The same figures give the same file.
    with mpl.rc_context({"svg.hashsalt": source.stem, "svg.fonttype": fonts}):
        figure.savefig(picture, dpi=150, metadata=about if picture.suffix == ".svg" else None)


# Training steps: scripts/bench/train.py


def _training(result: Result) -> Figure:
    """A panel for each routing and sitting, a bar for each row."""
    rows = rows_to_show(result)
    measured = [row for row in rows if "step_ms" in row]
    kinds = list(dict.fromkeys((row.get("routing"), row.get("sitting")) for row in measured))
    panels = [
        [row for row in rows if (row.get("routing"), row.get("sitting")) == kind] for kind in kinds
    ]
    heights = [len(panel) for panel in panels]
    figure = Figure(figsize=(8, 1.1 + 0.34 * sum(heights) + 0.4 * len(panels)))
    figure.set_layout_engine("constrained")
    figure.set_facecolor("white")  # on a dark page too
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, panel, kind in zip(all_axes[:, 0], panels, kinds, strict=True):
        _bars(axes, panel)
        routing, sitting = kind
        title = [f"{routing} routing"] if routing else []
        title += [f"sitting {sitting}"] if len({kind[1] for kind in kinds}) > 1 else []
        axes.set_title(", ".join(title), fontsize=9, loc="left")
        if stock := best_stock(rows, panel[0]):
            axes.axvline(stock["tflops_per_gpu"]["median"], color="#333333", lw=1, ls=":", zorder=0)
    most = max(row["tflops_per_gpu"]["max"] for row in measured)
    dotted = any(row["stack"] != "ours" for row in measured)
    last = all_axes[-1, 0]
    last.set_xlim(0, most * 1.12)
    last.set_xlabel(
        f"TFLOP/s per GPU, {machine_name(result)}" + ("; dotted: best stock" if dotted else "")
    )
    return figure


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
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
    names = [f"{training_name(row)}, micro-batch {row['micro_batch']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)


def alt_text(result: Result) -> str:
    """The picture in words: the fastest of ours, and of stock beside it."""
    rows = rows_to_show(result)
    ours = [row for row in rows if row["stack"] == "ours" and "step_ms" in row]
    best = max(ours, key=lambda row: row["tflops_per_gpu"]["median"], default=None)
    stock = best_stock(rows, best or rows[0])
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


# One MoE layer: scripts/bench/layer.py


def _layer(result: Result) -> Figure:
    """A panel for each shape, a bar for each path; its pieces are the medians of the parts."""
    rows = [row for row in result["rows"] if "error" not in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(9, 0.9 + 1.5 * len(shapes)), layout="constrained")
    all_axes = figure.subplots(len(shapes), 1, squeeze=False)
    for axes, shape in zip(all_axes[:, 0], shapes, strict=True):
        _stacked_bars(axes, [row for row in rows if row["shape"] == shape])
    all_axes[-1, 0].set_xlabel("milliseconds, forward and backward")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in PART_COLORS.values()]
    labels = [part.replace("_", " ") for part in PART_COLORS]
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    figure.text(0.995, 0.002, machine_name(result), ha="right", fontsize=7, color="0.4")
    return figure


def _stacked_bars(axes: Axes, rows: Sequence[Row]) -> None:
    first = rows[0]
    axes.set_title(
        f"{first['shape']}: hidden {first['hidden']}, experts {first['experts']} x {first['ffn']}, "
        f"top {first['top_k']}, {first['rows_per_expert']} rows an expert",
        fontsize=9, loc="left",
    )  # fmt: skip
    paths = [row["path"] for row in rows]
    left = [0.0] * len(rows)
    for part, color in PART_COLORS.items():
        widths = [_both_passes(row, part) for row in rows]
        axes.barh(paths, widths, left=left, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _both_passes(row: Row, part: str) -> float:
    """Milliseconds of a part in forward and backward; 0 if the path has no such part."""
    passes = (row["forward_parts_ms"], row["backward_parts_ms"])
    return sum(times[part]["median"] for times in passes if part in times)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.plots")
    parser.add_argument("results", type=Path, help="docs/results/train_NAME.json, moe_layer.json")
    parser.add_argument("--picture", type=Path, help="default: docs/images/NAME.svg")
    options = parser.parse_args(arguments)
    picture = options.picture or IMAGES / f"{options.results.stem}.svg"
    try:
        plot(options.results, picture)
    except KeyError as error:
        print(f"plots: {options.results} lacks {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"plots: {error}", file=sys.stderr)
        return 2
    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
