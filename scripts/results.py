"""What every file in docs/results/ says of itself: the machine, the versions, the commit."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from train.environment import commit, describe_environment, versions


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine(device: torch.device) -> dict[str, Any]:
    """The GPU by name and size, or the CPU by name."""
    if device.type != "cuda":
        return {"cpu": describe_environment(device, 1)["device_name"]}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def write(path: Path, device: torch.device, config: dict[str, Any], rows: list[Any]) -> None:
    """One JSON file of a benchmark's rows, with what they depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "config": config,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
