"""The file of `scripts.bench.train`: a row a stack and sitting, in `screening` and in `rows`.

A row has the raw `windows` of its repeats, and medians, extremes and 95% intervals made from them,
so that a later sitting can continue where this one stopped. No ratio mixes rows of two sittings.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.bench import results
from scripts.bench.results import Row, spread
from scripts.bench.stacks.spec import Spec
from train.config import Config
from train.metrics import flops
from train.metrics.throughput import peak_bf16_flops

SAME = ("stack", "path", "operations", "flags", "routing", "gpus")
"""What identifies a row's stack, whatever the micro-batch and the sitting."""


def read(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The file, or `fresh` where there is none. Raises ValueError where it is another config's."""
    if not path.exists():
        return fresh
    found = json.loads(path.read_text(encoding="utf-8"))
    if "screening" not in found or not _is_same(found.get("config"), fresh["config"]):
        raise ValueError(
            f"{path} is of another config or of another version of this benchmark; "
            "move it away, or give another --out"
        )
    return found


def _is_same(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether two configs agree in the keys that both have: newer versions have more."""
    return before is not None and all(
        values[key] == now[section].get(key, values[key])
        for section, values in before.items()
        if section in now
        for key in values
    )


def is_of(row: Row, spec: Spec, routing: str, gpus: int) -> bool:
    """Whether a row or a screening is this stack's."""
    wanted = spec.columns() | {"routing": routing, "gpus": gpus}
    return all(row.get(key) == wanted.get(key) for key in SAME)


def best_micro_batch(screening: Sequence[Row], spec: Spec, routing: str, gpus: int) -> int | None:
    """The micro-batch at which most tokens a second were trained on; None where none ran."""
    ran = [row for row in screening if is_of(row, spec, routing, gpus)]
    ran = [row for row in ran if "step_ms" in row]
    best = max(ran, key=lambda row: row["tokens_per_sec_per_gpu"]["median"], default=None)
    return None if best is None else best["micro_batch"]


def row_of(rows: list[Row], key: Row) -> Row:
    """The row with all of `key`, made where it is missing."""
    for row in rows:
        if all(row.get(name) == key.get(name) for name in (*SAME, "micro_batch", "sitting")):
            return row
    rows.append({**key, "repeats": 0, "windows": []})
    return rows[-1]


def add(row: Row, window: dict[str, Any], config: Config, device_name: str) -> None:
    """One more repeat; the row's figures are made again from all of them."""
    row["windows"].append(window)
    windows = row["windows"]
    gpus = row["gpus"]
    tokens = row["global_batch"] * config.model.seq_len
    seconds = [w["step_ms"] / 1e3 for w in windows]
    speeds = [tokens / gpus / s for s in seconds]
    count = flops.count(config.model, config.moe).flops_per_token
    row["repeats"] = len(windows)
    row["step_ms"] = spread([s * 1e3 for s in seconds])
    row["single_step_ms"] = spread([ms for w in windows for ms in w["single_step_ms"]])
    row["tokens_per_sec_per_gpu"] = spread(speeds)
    tflops = [speed * count / 1e12 for speed in speeds]
    row["tflops_per_gpu"] = spread(tflops)
    if len(tflops) > 1:
        row["tflops_per_gpu_mean"] = results.interval(tflops)
    if peak := peak_bf16_flops(device_name):
        row["mfu"] = spread([speed * count / peak for speed in speeds])

    def measured(name: str) -> list[float]:
        """In the windows that have it: a CPU measures less, and so did older versions."""
        return [w[name] for w in windows if w.get(name) is not None]

    for name in ("peak_allocated_gib", "outside_allocator_gib", "busiest_rank"):
        if found := measured(name):
            row[name] = spread(found)
    row["seconds_per_mtoken"] = spread([s / tokens * 1e6 for s in seconds])
    if joules := measured("step_joules"):
        row["joules_per_mtoken"] = spread([j / tokens * 1e6 for j in joules])
    row["redone_steps"] = sum(w["redone_steps"] for w in windows)
    row["dropped_rows"] = sum(w["dropped_rows"] for w in windows)
    if (first := windows[-1].get("first_loss")) is not None:
        row["first_loss"] = first
    row["final_loss"] = windows[-1]["final_loss"]  # null says that it was not a number
