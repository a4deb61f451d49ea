"""The smallest run, for tests that start many, and the metrics that must repeat from run to run."""

import time
from pathlib import Path
from typing import Any

from tests.support.ranks import read_metrics
from train.checkpoint.writer import Writer

TINY_MODEL = [
    "configs/demo_cpu.yaml",
    "model.seq_len=32",
    "moe.num_experts=4",
    "train.micro_batch=2",
    "train.global_batch=8",
]

TWO_LAYERS = [
    *TINY_MODEL,
    "train.log_every=1",
    "train.valid_every=0",
    "optim.warmup_steps=2",
    "tracking.mode=disabled",
    "data.workers=0",
]

TINY = [
    *TWO_LAYERS,
    "model.num_layers=1",
    "data.path=models",  # few files, found at once
]

REPEATED = (
    "loss/train",
    "loss/valid",
    "loss/aux",
    "optim/grad_norm",
    "optim/lr",
    "moe/max_expert_load",
)


def argv(folder: Path, name: str, *overrides: str) -> list[str]:
    """Arguments of a run in `folder/name`."""
    return [*TINY, f"run.dir={folder}", f"run.name={name}", *overrides]


def repeated(run_dir: Path) -> dict[int, dict[str, Any]]:
    """By step, the metrics that are the same bit for bit however often the run was stopped."""
    rows = read_metrics(run_dir)
    steps = [int(row["progress/step"]) for row in rows]
    assert steps == sorted(set(steps)), f"steps logged twice or out of order: {steps}"
    return {
        step: {key: row.get(key) for key in REPEATED} for step, row in zip(steps, rows, strict=True)
    }


def differences(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> list[str]:
    """Where two results of `repeated` differ, one value a line: pytest cuts a dictionary short."""
    return [
        f"step {step}: {key} {one.get(step, {}).get(key)!r} and {other.get(step, {}).get(key)!r}"
        for step in sorted(one.keys() | other.keys())
        for key in REPEATED
        if one.get(step, {}).get(key) != other.get(step, {}).get(key)
    ]


Rows = list[dict[str, float]]
"""Rows of metrics.jsonl."""

OF_ROOM = ("moe/room", "moe/redone_steps", "moe/waited_steps", "moe/kept_mib")
"""Metrics that `moe.capacity` may change though nothing is dropped; kept_mib is memory, the room
that was set aside included."""


def computed(rows: Rows) -> Rows:
    """The metrics that are the same bit for bit whatever time and room it took."""
    parts = ("progress/", "loss/", "optim/", "moe/")
    return [
        {key: n for key, n in row.items() if key.startswith(parts) and key not in OF_ROOM}
        for row in rows
    ]


def slow_saves(seconds: float) -> None:
    """Makes every save of this process begin to write so much later than it was begun."""
    quick = Writer.write_data

    def slow(self: Writer, plan: Any, planner: Any) -> Any:
        time.sleep(seconds)
        return quick(self, plan, planner)

    Writer.write_data = slow  # type: ignore[method-assign]


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of the finished checkpoints."""
    found = (run_dir / "checkpoints").glob("step_" + "[0-9]" * 8)
    return sorted(int(path.name.removeprefix("step_")) for path in found)
