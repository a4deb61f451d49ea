"""The picture of a results file, of training steps or of one MoE layer.

    python -m scripts.bench.plots docs/results/train_NAME.json [--picture FILE.svg]
    python -m scripts.bench.plots docs/results/moe_layer.json

Training steps: TFLOP/s per GPU, ours against stock; of one sitting on several numbers of GPUs, by
them. A bar is the median over the repeats, its whisker goes from the slowest to the fastest. One
layer: where its time goes, by path.
"""

import argparse
import hashlib
import html
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import vl_convert

from scripts import terminal
from scripts.bench.results import Result, Row, rows_to_show
from scripts.bench.tables import Filters, chosen, machine_name, sitting_of
from scripts.bench.tables.training import best_stock, failure, training_name
from scripts.compare.colors import CHOSEN, nth_color
from scripts.compare.curves import PAPER, Spec, config
from train.whole_file import whole

OURS, STOCK, FAILED = "#0072B2", "#8A8A94", "#9b2c1f"
NAME_WIDTH = 54
"""Characters of a bar's name in a line; two lines have space."""
WIDER_FONT = 56
"""Space for names in fonts wider than the one they are laid out with, such as DejaVu Sans."""
PEER = "#c9c9d1"
"""Stock beside paths in their own colors, of which one is gray."""
ONE_COLUMN = {"columns": 1, "labelLimit": 0}
LEVEL = {"labelAngle": 0, "labelLimit": 0}
LINE = 13
"""Height of a line of a bar's name, in pixels."""
PART_COLORS = {
    "quantize": "#4e79a7",
    "dispatch": "#76b7b2",
    "wrap": "#bab0ac",  # in results from before it stopped being a part: it moves nothing
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


def plot(source: Path, picture: Path, wanted: Filters | None = None) -> None:
    """Draw the results file `source` into `picture`; of training steps only the rows `wanted`.

    Raises ValueError where nothing is to draw.
    """
    result = chosen(source, json.loads(source.read_text(encoding="utf-8")), wanted or {})
    is_training = any("step_ms" in row for row in rows_to_show(result))
    if is_training:
        panels = _training(result)
    elif any("forward_parts_ms" in row for row in result["rows"]):
        panels = _layer(result)
    else:
        raise ValueError(f"{source} has no measurements of training steps or of a layer")
    look = config(PAPER)
    look["title"] |= {"fontSize": 12, "fontWeight": "normal", "offset": 6}
    look["axisX"] |= {"labelFlush": False, "tickCount": 6}
    look["axisY"] = {"labelLimit": 0, "labelColor": PAPER.ink, "labelLineHeight": LINE}
    look["legend"] |= {"orient": "top", "columns": 5, "title": None}
    padding = {"left": WIDER_FONT, "right": 8, "top": 8, "bottom": 8}
    spec = {"vconcat": panels, "config": look, "background": "white", "padding": padding}
    picture.parent.mkdir(parents=True, exist_ok=True)
    if picture.suffix == ".svg":
        svg = vl_convert.vegalite_to_svg(spec)
        mark = f"<desc>{html.escape(_mark(source, wanted))}</desc>" if is_training else ""
        drawn = svg.replace(">", f">{mark}", 1).encode()
    else:
        drawn = vl_convert.vegalite_to_png(spec, scale=2)
    with whole(picture) as new:
        new.write_bytes(drawn)


# Training steps: scripts/bench/train/


def _training(result: Result) -> list[Spec]:
    """A panel for each number of GPUs, routing and sitting, a bar for each row; or one by GPUs."""
    rows = rows_to_show(result)
    measured = [row for row in rows if "step_ms" in row]
    if comparable := _on_all(measured):
        origin = sitting_of(result, comparable[0])
        comparable.sort(key=lambda row: row["gpus"])
        return [_by_gpus([row | {"on": machine_name(origin, row["gpus"])} for row in comparable])]
    kinds = list(dict.fromkeys(_kind(row) for row in measured))
    most = max(row["tflops_per_gpu"]["max"] for row in measured)
    panels = []
    for kind in kinds:
        panel = [row for row in rows if _kind(row) == kind]
        stock = best_stock(rows, next((row for row in panel if row["stack"] == "ours"), panel[0]))
        dotted = "; dotted: best stock" if stock else ""
        machine = machine_name(sitting_of(result, panel[0]), panel[0].get("gpus"))
        axis = f"TFLOP/s per GPU, {machine}{dotted}"
        layers = _bars(
            panel, stock["tflops_per_gpu"]["median"] if stock else None,
            {"scale": {"domainMax": most}, "title": axis},
        )  # fmt: skip
        gpus, routing, sitting = kind
        title = [f"{gpus} GPUs"] if len({one[0] for one in kinds}) > 1 else []
        title += [f"{routing} routing"] if routing else []
        same = [one for one in kinds if one[:2] == kind[:2]]
        title += [f"sitting {sitting}"] if len(same) > 1 else []
        if len(sizes := {row["micro_batch"] for row in panel}) == 1:
            title += [f"micro-batch {min(sizes)}"]
        panels.append({"title": ", ".join(title), "width": 400, "height": {"step": 28}} | layers)
    return panels


def _on_all(rows: Sequence[Row]) -> list[Row]:
    """Rows of the stacks that one sitting measured on every number of its GPUs, at one micro-batch;
    none where there are several sittings or micro-batches, or one number of GPUs."""
    gpus = {row.get("gpus") for row in rows}
    alike = {(row.get("routing"), row.get("sitting"), row["micro_batch"]) for row in rows}
    if len(gpus) == 1 or len(alike) != 1:
        return []
    seen: dict[str, set[int]] = {}
    for row in rows:
        seen.setdefault(training_name(row), set()).add(row["gpus"])
    return [row for row in rows if seen[training_name(row)] == gpus]


def _by_gpus(rows: Sequence[Row]) -> Spec:
    """Groups of bars, one for each machine that rows were measured `on`."""
    names = list(dict.fromkeys(map(training_name, rows)))
    ours = {training_name(row): row["path"] for row in rows if row["stack"] == "ours"}
    colors: list[str] = []
    for name in names:
        color = PAPER.color(ours[name]) if name in ours else PEER
        another = nth_color(len(CHOSEN) + len(colors)).paper  # of a path's other flags
        colors.append(another if color in colors else color)
    values = [
        {"on": row["on"], "name": training_name(row), **row["tflops_per_gpu"]} for row in rows
    ]

    def y(field: str) -> Spec:
        return {"field": field, "type": "quantitative", "title": "TFLOP/s per GPU"}

    same = {"field": "name", "type": "nominal", "scale": {"domain": names, "range": colors}}
    figure = {"field": "median", "format": ",.0f"}
    first = rows[0]
    routing = [f"{first['routing']} routing"] if first.get("routing") else []
    return {
        "title": ", ".join([*routing, f"micro-batch {first['micro_batch']}"]),
        "width": 560,
        "height": 220,
        "data": {"values": values},
        "encoding": {
            "x": {"field": "on", "type": "nominal", "title": None, "sort": None, "axis": LEVEL},
            "xOffset": {"field": "name", "sort": names},
        },
        "layer": [
            {"mark": "bar", "encoding": {"y": y("median"), "color": same | {"legend": ONE_COLUMN}}},
            {
                "mark": {"type": "errorbar", "color": "black"},
                "encoding": {"y": y("min"), "y2": {"field": "max"}},
            },
            {
                "mark": {"type": "text", "dy": -8, "fontSize": 11},
                "encoding": {"y": y("max"), "text": figure},
            },
        ],
    }


def _kind(row: Row) -> tuple:
    return row.get("gpus"), row.get("routing"), row.get("sitting")


def _bars(rows: Sequence[Row], best: float | None, across: Spec) -> Spec:
    """Bars with whiskers and figures, and a dotted line at `best`; `across` is the axis of all."""
    differ = len({row["micro_batch"] for row in rows}) > 1
    names = [
        # The micro-batch and its number stay together.
        textwrap.wrap(
            training_name(row) + differ * f", micro-batch\xa0{row['micro_batch']}",
            NAME_WIDTH,
            break_on_hyphens=False,
        )
        for row in rows
    ]
    values = []
    for place, row in enumerate(rows):
        color = OURS if row["stack"] == "ours" else STOCK
        if "step_ms" in row:
            speed = row["tflops_per_gpu"]
            shown = {**speed, "text": f"{speed['median']:,.1f}", "ink": PAPER.ink}
        else:
            shown = {"max": 0, "text": failure(row), "ink": FAILED}
        values.append({"place": place, "color": color, **shown})

    def x(field: str) -> Spec:
        return {"field": field, "type": "quantitative", **across}

    def as_it_is(field: str) -> Spec:
        return {"field": field, "type": "nominal", "scale": None}

    # By their places, since two rows may share a name.
    axis: Spec = {"labelExpr": f"{json.dumps(names)}[datum.value]"}
    # Of a label of two lines the first is at the bar's middle; this moves it up by half a line.
    two = f"{json.dumps([len(lines) > 1 for lines in names])}[datum.value]"
    axis["labelOffset"] = {"condition": {"test": two, "value": -LINE / 2}, "value": 0}
    y = {"field": "place", "type": "ordinal", "title": None, "axis": axis}
    bar = {"type": "bar", "height": 18}
    whisker = {"type": "errorbar", "ticks": {"size": 8}, "color": "black"}
    dotted = {"type": "rule", "strokeDash": [2, 2], "color": "#333333"}
    text = {"type": "text", "align": "left", "dx": 6, "fontSize": 12}
    halo = text | {"stroke": "white", "strokeWidth": 4}  # the dotted line crosses no figure
    figure = {"x": x("max"), "text": {"field": "text"}}
    line = {"mark": dotted, "encoding": {"y": None, "x": {"datum": best}}}
    return {
        "data": {"values": values},
        "encoding": {"y": y},
        "layer": [
            {"mark": bar, "encoding": {"x": x("median"), "color": as_it_is("color")}},
            *([line] if best else []),
            {
                "transform": [{"filter": "isValid(datum.median)"}],
                "mark": whisker,
                "encoding": {"x": x("min"), "x2": {"field": "max"}},
            },
            {"mark": halo, "encoding": figure},
            {"mark": text, "encoding": {**figure, "color": as_it_is("ink")}},
        ],
    }


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


def is_picture_of(picture: Path, source: Path, wanted: Filters) -> bool:
    """Whether the picture was drawn from these rows of the file as it is now."""
    if not picture.exists():
        return False
    return html.escape(_mark(source, wanted)) in picture.read_text(encoding="utf-8")


def _mark(source: Path, wanted: Filters | None) -> str:
    content = hashlib.sha256(source.read_bytes()).hexdigest()
    return f"{source.name} {wanted or 'all rows'} sha256 {content}"


# One MoE layer: scripts/bench/layer/


def _layer(result: Result) -> list[Spec]:
    """A panel for each shape, a bar for each path; its pieces are the medians of the parts."""
    rows = [row for row in result["rows"] if "error" not in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    panels = [_stacked_bars([row for row in rows if row["shape"] == shape]) for shape in shapes]
    axis = f"milliseconds, forward and backward, on {machine_name(result)}"
    panels[-1]["encoding"]["x"]["title"] = axis
    return panels


def _stacked_bars(rows: Sequence[Row]) -> Spec:
    first = rows[0]
    names = {part: part.replace("_", " ") for part in PART_COLORS}
    scale = {"domain": [*names.values()], "range": [*PART_COLORS.values()]}
    values = [
        {"path": row["path"], "part": name, "ms": _both_passes(row, part), "place": place}
        for row in rows
        for place, (part, name) in enumerate(names.items())
    ]
    return {
        "title": f"{first['shape']}: hidden {first['hidden']}, experts {first['experts']} x "
        f"{first['ffn']}, top {first['top_k']}, {first['rows_per_expert']} rows an expert",
        "data": {"values": values},
        "width": 640,
        "height": {"step": 21},
        "mark": {"type": "bar", "height": 17},
        "encoding": {
            "y": {"field": "path", "type": "nominal", "sort": None, "title": None},
            "x": {"field": "ms", "type": "quantitative", "title": None},
            "color": {"field": "part", "type": "nominal", "scale": scale},
            "order": {"field": "place", "type": "quantitative"},
        },
    }


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
    terminal.run(main)
