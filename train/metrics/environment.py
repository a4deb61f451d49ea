"""The machine, the versions and the commit, so that two results can be compared."""

import ctypes
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import torch

from models.moe.dispatch.deep_ep_v2_needs import loaded_nccl
from train import allocator

PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "triton"),
    *("deep-ep", "deep-gemm"),
)


class Environment(TypedDict):
    """What goes into `environment.json`."""

    device: str
    device_name: str
    world_size: int
    versions: dict[str, str]
    commit: str | None
    allocator: str | None
    """What the environment tells PyTorch's allocator for CUDA; see `train.allocator`."""


def describe_environment(device: torch.device, world_size: int) -> Environment:
    """Describe this process and its `world_size` ranks."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "world_size": world_size,
        "versions": versions(),
        "commit": commit(),
        "allocator": allocator.setting(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name as CUDA reports it, or the CPU's as the system reports it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def versions() -> dict[str, str]:
    """Versions of Python, CUDA (where PyTorch has it), the packages that results depend on, and
    the cuBLAS and NCCL that are loaded, which PyTorch's package does not tell."""
    found = {"python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    loaded = {"cublas": _loaded_cublas(), "nccl": loaded_nccl()}
    return found | {name: ".".join(map(str, number)) for name, number in loaded.items() if number}


def _loaded_cublas() -> tuple[int, int, int] | None:
    """Of the library for CUDA 13; None where it is not loaded."""
    try:
        library = ctypes.CDLL("libcublasLt.so.13", mode=os.RTLD_NOLOAD)
        library.cublasLtGetVersion.restype = ctypes.c_size_t
        number: int = library.cublasLtGetVersion()
    except (OSError, AttributeError):
        return None
    return number // 10_000, number // 100 % 100, number % 100


def commit() -> str | None:
    """SOURCE_COMMIT, for a copy of the code without its history; or git's.

    Git's ends in `-dirty` where files differ from it.
    """
    if said := os.environ.get("SOURCE_COMMIT"):
        return said
    name = _git("describe", "--always", "--abbrev=12")
    # Not `describe --dirty`, which writes the index: if killed, it would leave a lock that blocks
    # every later git command.
    changes = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return f"{name}-dirty" if name and changes else name or None


def _git(*arguments: str) -> str:
    """What git prints of this code; nothing where it cannot."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
