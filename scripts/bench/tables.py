"""Files of `docs/results/` as Markdown tables; `scripts/bench/readme.py` says which kinds."""

import statistics
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path

from scripts.bench.results import Origin, Result, Row, Spread, rows_to_show

ABSENT = "–"  # noqa: RUF001

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


class InputError(Exception):
    """Bad input; its text is the one line to print."""


Filters = dict[str, list[str]]
"""The values that a row's keys may have; empty for all rows."""


def chosen(path: Path, result: Result, wanted: Filters) -> Result:
    """The same file with those of its rows alone. Raises InputError where none is left."""
    if not wanted:
        return result
    rows = [
        row
        for row in rows_to_show(result)
        if all(str(row.get(key)) in values for key, values in wanted.items())
    ]
    if not rows:
        raise InputError(f"{path} has no row of {wanted}")
    return {**result, "rows": rows, "screening": []}


def make_table(path: Path, result: Result, wanted: Filters) -> str:
    """A Markdown table and a line about where it comes from.

    `wanted` has the values that a row's keys may have; empty for all rows. Raises InputError.
    """
    rows = rows_to_show(result)
    if not rows:
        raise InputError(f"{path} has no rows")
    shown = rows_to_show(chosen(path, result, wanted))
    for mark, make in KINDS.items():
        if mark in rows[0]:
            return "\n".join([*make(shown, rows), "", _origin(path, result, shown), ""])
    raise InputError(f"{path}: its rows have none of {', '.join(KINDS)}; no table is known")


# Training steps: scripts/bench/train.py


def _training(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """A column that is the same in all rows is said below, in a line, instead."""
    columns = {
        "routing": [row.get("routing", ABSENT) for row in shown],
        "GPUs": [str(row.get("gpus", ABSENT)) for row in shown],
        "micro-batch": [str(row["micro_batch"]) for row in shown],
    }
    figures = [_figures(row, rows) for row in shown]
    for name in MEASURED:
        columns[name] = [row.get(name, ABSENT) for row in figures]
    columns["sitting"] = [row.get("sitting", ABSENT) for row in shown]
    common = {
        name: cells[0]
        for name, cells in columns.items()
        if name not in MEASURED and len(shown) > 1 and len(set(cells)) == 1
    }
    columns = {name: cells for name, cells in columns.items() if name not in common}
    body = [list(cells) for cells in zip(map(_row_name, shown), *columns.values(), strict=True)]
    left = 1 + ("routing" in columns)
    lines = _table(["", *columns], body, left=left)
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


MEASURED = ("ms a step", "median step", "TFLOP/s/GPU", "tokens/s/GPU", "peak GiB", "kJ/Mtoken",
            "rows dropped", "speed / best stock")  # fmt: skip


def _figures(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """What was measured, by column; of a stack that failed, why."""
    if "step_ms" not in row:
        return {"ms a step": failure(row)}
    speed, energy = row["tokens_per_sec_per_gpu"], row.get("joules_per_mtoken")
    stock = best_stock(rows, row)
    single = row.get("single_step_ms")
    cells = {
        "ms a step": _spread(row["step_ms"], "{:,.1f}"),
        "median step": f"{single['median']:,.1f}" if single else ABSENT,
        "TFLOP/s/GPU": _spread(row["tflops_per_gpu"], "{:,.1f}"),
        "tokens/s/GPU": _spread(speed, "{:,.0f}"),
        "peak GiB": _largest(row.get("peak_allocated_gib")),
        "rows dropped": str(row.get("dropped_rows", ABSENT)),
    }
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
    micro-batch."""
    peers = [
        peer
        for peer in rows
        if peer["stack"] != "ours"
        and "step_ms" in peer
        and all(peer.get(key) == row.get(key) for key in ("routing", "sitting", "gpus"))
    ]
    return max(peers, key=lambda peer: peer["tokens_per_sec_per_gpu"]["median"], default=None)


def training_name(row: Row, quote: str = "") -> str:
    """Stack, path and variant; of ours also which DeepEP dispatched, whether it was asked for or
    chosen."""
    parts = [f"{row['stack']} {quote}{row['path']}{quote}"]
    if operations := row.get("operations"):
        parts.append(f"operations {operations}")
    parts += [flag for flag in row.get("flags", []) if flag not in ("v1", "v2")]
    if library := DISPATCHED_BY.get(row.get("dispatch", "")):
        parts.append(library)
    return ", ".join(parts)


DISPATCHED_BY = {"deep_ep_v1": "DeepEP v1", "deep_ep_v2": "DeepEP v2"}


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


# One MoE layer: scripts/bench/layer.py


def _layer(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    head = ["shape", "path", "forward ms", "backward ms", "TFLOP/s/GPU", "peak GiB", "relayouts"]
    head += ["kernels", "speed / `fp8_baseline`"]
    body = []
    for row in shown:
        if "error" in row:
            body.append([row["shape"], failure(row), *[ABSENT] * 7])
            continue
        speed = row["tflops_per_gpu"]
        same = (
            other["tflops_per_gpu"]
            for other in rows
            if other["shape"] == row["shape"] and other.get("path") == "fp8_baseline"
        )
        base = next(same, None)
        passes = [row["profile"][name] for name in ("forward", "backward")]
        kernels = [one.get("kernels") for one in passes]
        cells = [
            row["shape"],
            f"`{row['path']}`",
            _spread(row["forward_ms"], "{:,.2f}"),
            _spread(row["backward_ms"], "{:,.2f}"),
            f"{speed['median']:,.0f}",
            _largest(row.get("peak_allocated_gib")),
            " + ".join(str(one["relayouts"]["counted"]) for one in passes),
            ABSENT if None in kernels else " + ".join(map(str, kernels)),
            f"{speed['median'] / base['median']:.3f}" if base else ABSENT,
        ]
        body.append(cells)
    return _table(head, body, left=2)


# Kernels: scripts/bench/kernels.py


def _kernels(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    head = ["kernel", "by", "shape", "µs", "GB/s", "of copy", "TFLOP/s", "of dense"]
    forms = {"gb_per_s": "{:,.0f}", "share_of_copy": "{:.0%}"}
    forms |= {"tflops": "{:,.0f}", "share_of_dense": "{:.0%}"}
    body = []
    for row in shown:
        figures = (form.format(row[key]) if key in row else ABSENT for key, form in forms.items())
        spread = _spread(row["us"], "{:,.1f}")
        body.append([row["kernel"], row["by"], row["shape"], spread, *figures])
    return _table(head, body, left=3)


# Two paths step by step: scripts/bench/pairs.py


def _pairs(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    head = ["", "hidden", "tokens/GPU", "ms a step", "saves ms", "saves %", "relayouts", "peak GiB"]
    body = []
    for row in shown:
        first, second = (f"`{name}`" for name in row["pair"])
        saved = [
            f"{row[name]['mean']:.{digits}f} ± {row[name]['plus_minus']:.{digits}f}"
            for name, digits in (("saved_ms", 3), ("saved_percent", 2))
        ]
        peaks = row.get("peak_allocated_gib")
        cells = [
            f"{second} against {first}",
            f"{row['hidden']:,}",
            f"{row['tokens_per_gpu']:,}",
            f"{row['step_ms'][0]:,.2f}",
            *saved,
            " → ".join(f"{number:.0f}" for number in row["relayouts_a_layer"]),
            " → ".join(f"{peak:.2f}" for peak in peaks) if peaks else ABSENT,
        ]
        body.append(cells)
    return _table(head, body)


# Kernels of one traced step: scripts/bench/trace.py


def _step_kernels(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    body = [
        [kind, *(f"{row['ms'][kind]:,.1f}" for row in shown)]
        for kind in shown[0]["ms"]
        if kind in ("idle", "span") or any(row["ms"][kind] >= 0.05 for row in shown)
    ]
    return _table(["ms of one traced step", *(f"`{row['traced']}`" for row in shown)], body)


# Runs compared: scripts/compare/__main__.py


def _comparison(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    if _has_repeats(shown):
        return _repeated(shown)
    body = [
        [label, *(row.get(label, ABSENT) for row in shown)]
        for label in COMPARED
        if any(label in row for row in shown)
    ]
    paths = [row["path"] for row in shown]
    names = [row["path"] if paths.count(row["path"]) == 1 else row["run"] for row in shown]
    return _table(["", *(f"`{name}`" for name in names)], body)


REPEATED = {
    "final train loss": "{:.3f}",
    "final valid loss": "{:.3f}",
    "busiest expert / mean": "{:.2f}",
    "worst busiest expert / mean": "{:.2f}",
    "final busiest expert / mean": "{:.2f}",
    "final load entropy": "{:.3f}",
}
"""Columns of a comparison of repeats."""


def _has_repeats(shown: Sequence[Row]) -> bool:
    """Whether runs of one configuration are among these rows of a comparison."""
    names = [row["arm"] for row in shown if "arm" in row]
    return len(set(names)) < len(names)


def _repeats(shown: Sequence[Row]) -> Iterable[int]:
    """Runs of each configuration."""
    return Counter(row["arm"] for row in shown).values()


def _repeated(shown: Sequence[Row]) -> list[str]:
    """A row per configuration, named by the keys that tell them apart."""
    sides: dict[str, list[Row]] = {}
    for row in shown:
        sides.setdefault(row["arm"], []).append(row)
    keys = list(shown[0]["differs"])
    body = []
    for runs in sides.values():
        figures = [
            _mean([run[label] for run in runs if run.get(label, ABSENT) != ABSENT], form)
            for label, form in REPEATED.items()
        ]
        body.append([*(str(runs[0]["differs"][key]) for key in keys), *figures])
    return _table([*(f"`{key}`" for key in keys), *REPEATED], body, left=len(keys))


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


# Plans against what was measured: scripts/plan/fit.py


def _planned(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    of_one = ["planned", "off by", "role"]
    head = ["measured step", "peak GiB", *of_one, "ms a step", *of_one]
    body = []
    for row in shown:
        cells = [row["planned"]]
        for unit, form in (("gib", "{:.2f}"), ("ms", "{:.1f}")):
            if f"measured_{unit}" not in row:
                cells += [ABSENT] * 4
                continue
            cells += [form.format(row[f"{of}_{unit}"]) for of in ("measured", "planned")]
            cells += [f"{row[f'error_{unit}']:+.1%}", row[f"role_{unit}"]]
        body.append(cells)
    return _table(head, body)


KINDS: dict[str, Callable[[Sequence[Row], Sequence[Row]], list[str]]] = {
    "planned": _planned,
    "pair": _pairs,
    "stack": _training,
    "kernel": _kernels,
    "shape": _layer,
    "run": _comparison,
    "traced": _step_kernels,
}
"""By a key that only rows of that kind have; the first one that matches. (Kernels have shapes
too.)"""


def _spread(figure: Spread, form: str) -> str:
    """The median, and from where to where the measurements went."""
    low, high = form.format(figure["min"]), form.format(figure["max"])
    middle = form.format(figure["median"])
    return middle if low == high else f"{middle} [{low} to {high}]"


def _largest(figure: Spread | None) -> str:
    return ABSENT if figure is None else f"{figure['max']:.1f}"


def _table(head: list[str], body: Sequence[list[str]], left: int = 1) -> list[str]:
    """Lines of Markdown, the first `left` columns as text; columns without a figure left out."""
    kept = [i for i in range(len(head)) if i < left or any(row[i] != ABSENT for row in body)]
    rule = ["---" if i < left else "---:" for i in kept]
    lines = [_line([row[i] for i in kept]) for row in (head, *body)]
    return [lines[0], _line(rule), *lines[1:]]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(path: Path, result: Result, shown: Sequence[Row]) -> str:
    origins = [sitting_of(result, row) for row in shown]
    machines = [machine_name(o, row.get("gpus")) for o, row in zip(origins, shown, strict=True)]
    where = ", ".join(dict.fromkeys(machines))
    commits = ", ".join(dict.fromkeys(str(one.get("commit")) for one in origins))
    versions = result.get("versions") or {}
    names = ("torch", "transformer-engine", "megatron-core", "triton")
    said = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    parts = [where, said, f"commit {commits if result.get('commit') else 'not known'}"]
    if bench := result.get("bench"):  # of training steps
        if result["rows"]:
            steps = _steps(shown) or bench["steps"]
            parts.append(f"median [least to most] of {_windows(shown)} of {steps} steps")
        else:
            parts.append(f"screened: one window of {bench['screen_steps']} steps each")
    elif "pair" in result["rows"][0]:
        parts.append("mean ± 95% interval")
    elif _has_repeats(shown):
        parts.append(f"mean [least to most] of {_range(_repeats(shown))} runs")
    elif not {"run", "traced", "planned"} & set(result["rows"][0]):
        parts.append("median [least to most]")
    return "; ".join([*filter(None, parts), f"[{path.name}](RESULTS/{path.name})"])


def sitting_of(result: Result, row: Row) -> Origin:
    """Where a row was measured: its sitting, or the file where it names none."""
    return result.get("sittings", {}).get(row.get("sitting", ""), result)


def _windows(shown: Sequence[Row]) -> str:
    """How many each row has."""
    numbers = _range(row["repeats"] for row in shown if row.get("repeats")) or "no"
    return f"{numbers} window{'' if numbers == '1' else 's'}"


def _steps(shown: Sequence[Row]) -> str:
    """Of a window; empty where the rows do not say."""
    return _range(
        len(window["single_step_ms"])
        for row in shown
        for window in row.get("windows", ())
        if "single_step_ms" in window
    )


def _range(counts: Iterable[int]) -> str:
    """From the smallest to the largest; empty where there is none."""
    found = sorted(set(counts))
    return " to ".join(map(str, dict.fromkeys((found[0], found[-1])))) if found else ""


def machine_name(result: Origin, gpus: int | None = None) -> str:
    """The machine and how many of its devices, where a row says how many it used."""
    machine = result["machine"]
    if not isinstance(machine, dict):
        return str(machine)
    name = machine.get("gpu") or machine.get("device_name") or machine["cpu"]
    return f"{gpus or machine.get('devices', 1)} x {name}"
