"""Where a benchmark's figures come from: machine, versions and commit."""

import torch

from scripts.bench.results import Origin
from train.metrics.environment import describe_environment
from train.metrics.throughput import GIB


def describe_machine(device: torch.device, world_size: int = 1) -> Origin:
    """`machine`, `versions` and `commit` of a results file."""
    environment = describe_environment(device, world_size)
    machine: dict[str, str | float] = {
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
