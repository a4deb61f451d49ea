"""Training steps as a Markdown table: rows of scripts/bench/train/."""

from collections.abc import Container, Sequence

from scripts.bench.results import Row, Spread
from scripts.bench.tables.markdown import ABSENT, largest, span, table


def training_table(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """A column that is the same in all rows is said below, in a line, instead."""
    columns = {
        "routing": [row.get("routing", ABSENT) for row in shown],
        "GPUs": [str(row.get("gpus", ABSENT)) for row in shown],
        "micro-batch": [str(row["micro_batch"]) for row in shown],
    }
    figures = [_figures(row, rows) for row in shown]
    for name in MEASURED:
        columns[name] = [row.get(name, ABSENT) for row in figures]
    for name in RARE:
        if set(columns[name]) <= {"0", ABSENT}:
            del columns[name]
    columns["sitting"] = [row.get("sitting", ABSENT) for row in shown]
    common = {
        name: cells[0]
        for name, cells in columns.items()
        if name not in MEASURED and len(shown) > 1 and len(set(cells)) == 1
    }
    columns = {name: cells for name, cells in columns.items() if name not in common}
    body = [list(cells) for cells in zip(map(_row_name, shown), *columns.values(), strict=True)]
    left = 1 + ("routing" in columns)
    lines = table(["", *columns], body, left=left)
    said = [f"{name} {cell}" for name, cell in common.items() if cell != ABSENT]
    if said:
        lines += ["", f"In all rows: {', '.join(said)}."]
    names = {
        f"{training_name(stock, '`')} at micro-batch {stock['micro_batch']}" + _which(stock, common)
        for row in shown
        if (stock := best_stock(rows, row))
    }
    if names:
        lines += ["", f"Best stock, the fastest of the peers: {'; '.join(sorted(names))}."]
    return lines


MEASURED = (
    "ms a step", "median step", "TFLOP/s/GPU", "tokens/s/GPU", "peak GiB", "outside GiB",
    "kJ/Mtoken", "rows dropped", "repeated steps", "steps that waited", "busiest rank",
    "room", "speed / best stock",
)  # fmt: skip
RARE = ("repeated steps", "steps that waited")
"""Left out where there are none."""


def _figures(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """What was measured, by column; of a stack that failed, why."""
    if "step_ms" not in row:
        return {"ms a step": failure(row)}
    speed, energy = row["tokens_per_sec_per_gpu"], row.get("joules_per_mtoken")
    stock = best_stock(rows, row)
    single = row.get("single_step_ms")
    cells = {
        "ms a step": span(row["step_ms"], "{:,.1f}"),
        "median step": f"{single['median']:,.1f}" if single else ABSENT,
        "TFLOP/s/GPU": span(row["tflops_per_gpu"], "{:,.1f}"),
        "tokens/s/GPU": span(speed, "{:,.0f}"),
        "peak GiB": largest(row.get("peak_allocated_gib")),
        "outside GiB": largest(row.get("outside_allocator_gib")),
        "rows dropped": str(row.get("dropped_rows", ABSENT)),
        "repeated steps": str(row.get("redone_steps", ABSENT)),
        "steps that waited": str(row.get("waited_steps", ABSENT)),
    }
    if load := row.get("busiest_rank"):
        cells["busiest rank"] = f"{load['median']:.2f}"
    if room := row.get("room"):
        cells["room"] = f"{room['median']:.2f}"
    if energy:
        cells["kJ/Mtoken"] = f"{energy['median'] / 1e3:,.1f}"
    if stock:
        cells["speed / best stock"] = _ratio(speed, stock["tokens_per_sec_per_gpu"])
    return cells


def _row_name(row: Row) -> str:
    name = training_name(row, "`")
    if "step_ms" in row and "error" in row:  # it failed in a later repeat
        name += f", {row['repeats']} of the repeats, then {failure(row)}"
    return name


def _which(stock: Row, common: Container[str]) -> str:
    """Of several best ones, whose this is."""
    said = []
    if "routing" in stock and "routing" not in common:
        said.append(stock["routing"])
    if "GPUs" not in common and "gpus" in stock:
        said.append(f"{stock['gpus']} GPUs")
    return f" ({', '.join(said)})" if said else ""


def best_stock(rows: Sequence[Row], row: Row) -> Row | None:
    """The fastest stack that is not ours, of the row's routing and sitting, at its own
    micro-batch. Beside a row by DeepEP, one without it is not at its best."""
    without = row["stack"] != "ours" or _dispatched_by(row) == ALL_TO_ALL
    peers = [
        peer
        for peer in rows
        if peer["stack"] != "ours"
        and "step_ms" in peer
        and (without or _dispatched_by(peer) != ALL_TO_ALL)
        and all(peer.get(key) == row.get(key) for key in ("routing", "sitting", "gpus"))
    ]
    return max(peers, key=lambda peer: peer["tokens_per_sec_per_gpu"]["median"], default=None)


def training_name(row: Row, quote: str = "") -> str:
    """Stack, path and variant; of ours also which DeepEP dispatched, whether it was asked for or
    chosen, and of all where none did."""
    parts = [f"{row['stack']} {quote}{row['path']}{quote}"]
    if operations := row.get("operations"):
        parts.append(f"operations {operations}")
    parts += [flag for flag in row.get("flags", []) if flag not in ("v1", "v2")]
    if library := _dispatched_by(row):
        parts.append(library)
    return ", ".join(parts)


ALL_TO_ALL = "all-to-all"
DISPATCHED_BY = {"deep_ep_v1": "DeepEP v1", "deep_ep_v2": "DeepEP v2"}
DISPATCHED_BY |= {"all_to_all": ALL_TO_ALL, "alltoall": ALL_TO_ALL}


def _dispatched_by(row: Row) -> str | None:
    """None on one GPU, and of stock megatron-core by DeepEP v1, which is all that it takes."""
    return DISPATCHED_BY.get(row.get("dispatch", "")) if row.get("gpus", 1) > 1 else None


def failure(row: Row) -> str:
    """The row's error in few words; they must not end a cell of the table."""
    error = str(row["error"])
    if "out of memory" in error.lower() or "OutOfMemory" in error:
        return "out of memory"
    return error[:60].replace("|", "/")


def _ratio(ours: Spread, theirs: Spread) -> str:
    """Ratio of the medians, and its smallest and largest value between any two of the repeats."""
    low, high = ours["min"] / theirs["max"], ours["max"] / theirs["min"]
    middle = f"{ours['median'] / theirs['median']:.3f}"
    return middle if low == high else f"{middle} [{low:.3f} to {high:.3f}]"
