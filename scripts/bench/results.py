"""What the benchmarks' JSON files in `docs/results/` have in common."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from train.metrics.environment import describe_environment
from train.metrics.throughput import GIB


def spread(values: Sequence[float]) -> dict[str, float]:
    """`median`, `min` and `max` of one figure over its repeats. Raises StatisticsError if empty."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def describe_machine(device: torch.device, world_size: int = 1) -> dict[str, Any]:
    """`machine`, `versions` and `commit` of a results file."""
    environment = describe_environment(device, world_size)
    machine = {
        "device": environment["device"],
        "device_name": environment["device_name"],
        "devices": world_size,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "memory_gib": round(properties.total_memory / GIB, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
        }
    return {
        "machine": machine,
        "versions": environment["versions"],
        "commit": environment["commit"],
    }


def write(
    path: Path, device: torch.device, config: dict[str, Any], rows: list[Any], world_size: int = 1
) -> None:
    """One JSON file of a benchmark's rows, with what they depend on."""
    write_json(path, {**describe_machine(device, world_size), "config": config, "rows": rows})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` at once, so that a crash leaves the old file or the new. NaN is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    new.replace(path)
