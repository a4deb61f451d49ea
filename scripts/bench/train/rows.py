"""The file of `scripts.bench.train`: a row a stack and sitting, in `screening` and in `rows`.

A row has the raw `windows` of its repeats, and medians, extremes and 95% intervals made from them,
so that a later sitting can continue where this one stopped. No ratio mixes rows of two sittings.

One row is measured again, at its commit, by what it has under these names:

    python -m scripts.bench.train configs/NAME.yaml --gpus GPUS --stacks STACK --repeats 1 \\
        --screen MICRO_BATCH --routings ROUTING --warmup WARMUP_STEPS --steps STEPS \\
        --out FOLDER parallel.expert_parallel=EXPERT_PARALLEL

STACK is `path`, `operations` and `flags` with colons between, for megatron-core after `stock:`, and
STEPS the length of a window's `single_step_ms`. Other keys that differ from the YAML file are in
the `config` of the results.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from scripts.bench import results
from scripts.bench.results import Interval, Row, Spread, spread
from scripts.bench.stacks.spec import Spec
from train.config import Config
from train.metrics import flops
from train.metrics.throughput import peak_bf16_flops


class TrainingRow(TypedDict, total=False):
    """One row. Figures over repeats are a `Spread`: a window has one value, all of them have its
    `median`, `min` and `max`."""

    stack: str
    """`ours` or `megatron-core`."""
    path: str
    operations: str
    """Where others than the path's own were used: `triton`, `te_dequantize`."""
    flags: list[str]
    """The other flags of the stack's name (scripts/bench/stacks/spec.py)."""
    routing: str
    """`balanced`: forced, on random tokens. `natural`: the router's, on the config's text."""
    gpus: int
    micro_batch: int
    """Sequences that a rank computes at a time."""
    sitting: str
    """Its machine, versions and commit are in the file's `sittings`."""
    version: str | None
    """The commit, of ours; of megatron-core its version."""
    global_batch: int
    """Sequences of a step, on all ranks."""
    expert_parallel: int
    warmup_steps: int
    """Steps before a window; older rows do not say."""
    dispatch: str
    """Who dispatched: `deep_ep_v1`, `deep_ep_v2`, `all_to_all`; of megatron-core `deepep`,
    `alltoall`."""
    description: str
    """Which library ran what."""
    error: str
    """Why a window is missing, in one line."""
    repeats: int
    windows: list[dict[str, Any]]
    """What each process measured: the fields of `Window` (scripts/bench/measure/window.py).
    `alone_on_the_machine` was noted by hand, of one sitting."""

    step_ms: Spread
    """Milliseconds of a step, the mean of a window; all speeds are made from it."""
    single_step_ms: Spread
    """Of all single steps of all windows: its median is the `median step` of a table."""
    tokens_per_sec_per_gpu: Spread
    tflops_per_gpu: Spread
    """By the FLOPs that the model needs for a token (train/metrics/flops.py), the same for all
    stacks, whatever they compute again or pad."""
    tflops_per_gpu_mean: Interval
    """The same as a mean and its 95% interval, of two windows or more."""
    mfu: Spread
    """`tflops_per_gpu` over the GPU's dense BF16 peak, 0 to 1; absent where that is not known."""
    peak_allocated_gib: Spread
    outside_allocator_gib: Spread
    busiest_rank: Spread
    room: Spread
    seconds_per_mtoken: Spread
    """Seconds for a million tokens, on all GPUs together."""
    joules_per_mtoken: Spread
    """Energy of all GPUs for a million tokens."""
    redone_steps: int
    """The sum of all windows, as of the next two."""
    waited_steps: int
    dropped_rows: int
    """Of all steps and ranks; up to commit afc4cc3 of each window's last step alone."""
    first_loss: float
    """The last window's, as `final_loss`."""
    final_loss: float | None
    """None says that it was not a number."""


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
    """The micro-batch at which most tokens a second were trained on; None where none ran.

    The longest step of each window is left out: a window of screening is so short that one step in
    which a kernel is compiled would decide.
    """
    ran = [row for row in screening if is_of(row, spec, routing, gpus)]
    ran = [row for row in ran if "step_ms" in row]

    def sequences_per_ms(row: Row) -> float:
        return row["global_batch"] / statistics.median(map(_usual_ms, row["windows"]))

    best = max(ran, key=sequences_per_ms, default=None)
    return None if best is None else best["micro_batch"]


def _usual_ms(window: Row) -> float:
    """The mean step without the longest; old windows, without single steps, count as they are."""
    steps = sorted(window.get("single_step_ms", []))
    return statistics.mean(steps[:-1]) if len(steps) > 1 else window["step_ms"]


def row_of(rows: list[Row], key: Row) -> TrainingRow:
    """The row with all of `key`, made where it is missing."""
    for row in rows:
        if all(row.get(name) == key.get(name) for name in (*SAME, "micro_batch", "sitting")):
            return cast(TrainingRow, row)
    rows.append({**key, "repeats": 0, "windows": []})
    return cast(TrainingRow, rows[-1])


def repeats_of(
    rows: Sequence[Row], spec: Spec, routing: str, gpus: int, sitting: str | None = None
) -> int:
    """How often a stack was measured in the sitting with most, or in the one that is named."""
    found = [row for row in rows if is_of(row, spec, routing, gpus)]
    return max((row["repeats"] for row in found if sitting in (None, row["sitting"])), default=0)


def add(row: TrainingRow, window: dict[str, Any], config: Config, device_name: str) -> None:
    """One more repeat; the row's figures are made again from all of them.

    `window` has the fields of `Window`; `config` is the stack's, at any micro-batch.
    """
    row["windows"].append(window)
    windows = row["windows"]
    tokens = row["global_batch"] * config.model.seq_len
    seconds = [w["step_ms"] / 1e3 for w in windows]
    speeds = [tokens / row["gpus"] / s for s in seconds]
    flops_per_token = flops.count(config.model, config.moe).flops_per_token

    def measured(name: str) -> list[float]:
        """In the windows that have it: a CPU measures less, and so did older versions."""
        return [w[name] for w in windows if w.get(name) is not None]

    row["repeats"] = len(windows)
    row["step_ms"] = spread([s * 1e3 for s in seconds])
    row["single_step_ms"] = spread([ms for w in windows for ms in w["single_step_ms"]])
    row["tokens_per_sec_per_gpu"] = spread(speeds)
    tflops = [speed * flops_per_token / 1e12 for speed in speeds]
    row["tflops_per_gpu"] = spread(tflops)
    if len(tflops) > 1:
        row["tflops_per_gpu_mean"] = results.interval(tflops)
    if peak := peak_bf16_flops(device_name):
        row["mfu"] = spread([speed * flops_per_token / peak for speed in speeds])
    if peaks := measured("peak_allocated_gib"):
        row["peak_allocated_gib"] = spread(peaks)
    if outside := measured("outside_allocator_gib"):
        row["outside_allocator_gib"] = spread(outside)
    if loads := measured("busiest_rank"):
        row["busiest_rank"] = spread(loads)
    if rooms := measured("room"):
        row["room"] = spread(rooms)
    row["seconds_per_mtoken"] = spread([s / tokens * 1e6 for s in seconds])
    if joules := measured("step_joules"):
        row["joules_per_mtoken"] = spread([j / tokens * 1e6 for j in joules])
    row["redone_steps"] = sum(w["redone_steps"] for w in windows)
    row["waited_steps"] = sum(w.get("waited_steps", 0) for w in windows)  # older ones had none
    row["dropped_rows"] = sum(w["dropped_rows"] for w in windows)
    if (first := windows[-1].get("first_loss")) is not None:
        row["first_loss"] = first
    row["final_loss"] = windows[-1]["final_loss"]
