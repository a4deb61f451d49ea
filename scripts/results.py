"""What the benchmarks' JSON files in `docs/results/` have in common."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from train.environment import describe_environment
from train.metrics import GIB


def spread(values: Sequence[float]) -> dict[str, float]:
    """`median`, `min` and `max` of one figure over its repeats. Raises StatisticsError if empty."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def describe_machine(device: torch.device, world_size: int) -> dict[str, Any]:
    """`machine`, `versions` and `commit` of a results file."""
    environment = describe_environment(device, world_size)
    machine = {
        "device": environment["device"],
        "device_name": environment["device_name"],
        "devices": world_size,
    }
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        machine["memory_gib"] = round(total / GIB, 1)
    return {
        "machine": machine,
        "versions": environment["versions"],
        "commit": environment["commit"],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` at once, so that a crash leaves the old file or the new. NaN is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    new.replace(path)
