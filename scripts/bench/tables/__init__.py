"""Files of `docs/results/` as Markdown tables; `scripts/bench/readme.py` says which kinds."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from scripts.bench.results import Origin, Result, Row, rows_to_show
from scripts.bench.tables.comparison import comparison_table, has_repeats, repeats
from scripts.bench.tables.markdown import ABSENT, largest, span, table
from scripts.bench.tables.training import failure, training_table


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


# One MoE layer: scripts/bench/layer/


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
            span(row["forward_ms"], "{:,.2f}"),
            span(row["backward_ms"], "{:,.2f}"),
            f"{speed['median']:,.0f}",
            largest(row.get("peak_allocated_gib")),
            " + ".join(str(one["relayouts"]["counted"]) for one in passes),
            ABSENT if None in kernels else " + ".join(map(str, kernels)),
            f"{speed['median'] / base['median']:.3f}" if base else ABSENT,
        ]
        body.append(cells)
    return table(head, body, left=2)


# Kernels: scripts/bench/kernels/


def _kernels(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    head = ["kernel", "by", "shape", "µs", "GB/s", "of copy", "TFLOP/s", "of dense"]
    forms = {"gb_per_s": "{:,.0f}", "share_of_copy": "{:.0%}"}
    forms |= {"tflops": "{:,.0f}", "share_of_dense": "{:.0%}"}
    body = []
    for row in shown:
        figures = (form.format(row[key]) if key in row else ABSENT for key, form in forms.items())
        us = span(row["us"], "{:,.1f}")
        body.append([row["kernel"], row["by"], row["shape"], us, *figures])
    return table(head, body, left=3)


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
    return table(head, body)


# Kernels of one traced step: scripts/bench/trace.py


def _step_kernels(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    body = [
        [kind, *(f"{row['ms'][kind]:,.1f}" for row in shown)]
        for kind in shown[0]["ms"]
        if kind in ("idle", "span") or any(row["ms"][kind] >= 0.05 for row in shown)
    ]
    return table(["ms of one traced step", *(f"`{row['traced']}`" for row in shown)], body)


# Dispatch and combine beside DeepEP's own tests: scripts/bench/deep_ep_tests.py


def _calls(shown: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    head = ["call", "by", "its own test, µs", "GB/s", "in a layer of", "forward µs", "backward µs"]
    body = [
        [
            row["call"],
            row["dispatcher"],
            f"{row['own_test']['us']:,.0f}",
            f"{row['own_test']['gb_per_s']:,.0f}",
            f"`{row['path']}`",
            f"{row['forward_us']:,.0f}",
            f"{row['backward_us']:,.0f}",
        ]
        for row in shown
    ]
    return table(head, body, left=2)


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
    return table(head, body)


KINDS: dict[str, Callable[[Sequence[Row], Sequence[Row]], list[str]]] = {
    "planned": _planned,
    "call": _calls,
    "pair": _pairs,
    "stack": training_table,
    "kernel": _kernels,
    "shape": _layer,
    "run": comparison_table,
    "traced": _step_kernels,
}
"""By a key that only rows of that kind have; the first one that matches. (Kernels have shapes
too.)"""


VERSIONS = (
    "torch", "transformer-engine", "megatron-core", "triton",
    "deep-ep", "deep-gemm", "cublas", "nccl",
)  # fmt: skip
"""Packages that a caption names, where the sitting says its version."""


def _versions(origins: Sequence[Origin], name: str) -> list[str]:
    known = [(one.get("versions") or {}).get(name) for one in origins]
    return list(dict.fromkeys(filter(None, known)))


def _origin(path: Path, result: Result, shown: Sequence[Row]) -> str:
    origins = [sitting_of(result, row) for row in shown]
    machines = [machine_name(o, row.get("gpus")) for o, row in zip(origins, shown, strict=True)]
    where = ", ".join(dict.fromkeys(machines))
    commits = ", ".join(dict.fromkeys(str(one.get("commit")) for one in origins))
    said = ", ".join(
        f"{name} {' and '.join(found)}"
        for name in VERSIONS
        if (found := _versions(origins or [result], name))
    )
    parts = [where, said, f"commit {commits if result.get('commit') else 'not known'}"]
    if bench := result.get("bench"):  # of training steps
        if result["rows"]:
            steps = _steps(shown) or bench["steps"]
            parts.append(f"median [least to most] of {_windows(shown)} of {steps} steps")
        else:
            parts.append(f"screened: one window of {bench['screen_steps']} steps each")
    elif "pair" in result["rows"][0]:
        parts.append("mean ± 95% interval")
    elif has_repeats(shown):
        parts.append(f"mean [least to most] of {_range(repeats(shown))} runs")
    elif not {"run", "traced", "planned", "call"} & set(result["rows"][0]):
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
    """The machine, and how many of its devices: as many as a row used, where it says so."""
    machine = result["machine"]
    if not isinstance(machine, dict):
        return str(machine)
    name = machine.get("gpu") or machine.get("device_name") or machine["cpu"]
    return f"{gpus or machine.get('devices', 1)} x {name}"
