"""The picture of scripts/bench/layer.py's figures: where the time of a layer goes, by path."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from train.profiling.moe import PARTS

COLORS = {
    "quantize": "#4e79a7",
    "dispatch": "#76b7b2",
    "wrap": "#bab0ac",
    "permute": "#a0cbe8",
    "relayout": "#e15759",  # the subject: the only red
    "up_projection": "#59a14f",
    "swiglu": "#edc948",
    "down_projection": "#8cd17d",
    "combine": "#499894",
    "dgrad": "#b6992d",
    "wgrad": "#9c755f",
    "quantize_weights": "#b07aa1",
    "other": "#d7d7d7",
}


def plot(source: Path, picture: Path) -> None:
    """Draw the JSON file `source` into `picture`, a panel a shape and a bar a path.

    A bar's pieces are the medians of each part, forward and backward added up. Raises ValueError
    if the file has no row to draw.
    """
    content = json.loads(source.read_text())
    rows = [row for row in content["rows"] if "error" not in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if not shapes:
        raise ValueError(f"{source} has no measurements")
    plt.rcParams["svg.hashsalt"] = "moe_layer"  # the same figures give the same file
    figure, axes = plt.subplots(
        len(shapes), 1, figsize=(9, 0.9 + 1.5 * len(shapes)), layout="constrained", squeeze=False
    )
    for axis, shape in zip(axes[:, 0], shapes, strict=True):
        _panel(axis, [row for row in rows if row["shape"] == shape])
    axes[-1, 0].set_xlabel("milliseconds, forward and backward")
    parts = (*PARTS, "other")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[part]) for part in parts]
    labels = [part.replace("_", " ") for part in parts]
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    machine = content["machine"]
    figure.text(
        0.995, 0.002, machine.get("gpu", machine.get("cpu")), ha="right", fontsize=7, color="0.4"
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
    plt.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    axis.set_title(
        f"{first['shape']}: hidden {first['hidden']}, experts {first['experts']} x {first['ffn']}, "
        f"top {first['top_k']}, {first['rows_per_expert']} rows an expert",
        fontsize=9, loc="left",
    )  # fmt: skip
    paths = [row["path"] for row in rows]
    left = [0.0] * len(rows)
    for part in (*PARTS, "other"):
        widths = [_both(row, part) for row in rows]
        axis.barh(paths, widths, left=left, color=COLORS[part])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _both(row: dict[str, Any], part: str) -> float:
    """Milliseconds of a part in forward and backward; 0 if the path has no such part."""
    passes = (row["forward_parts_ms"], row["backward_parts_ms"])
    return sum(times[part]["median"] for times in passes if part in times)
