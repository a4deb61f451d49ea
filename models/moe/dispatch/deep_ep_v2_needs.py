"""What DeepEP v2 needs of a machine: why it can't run, before it is tried."""

import ctypes
import inspect
import os

import torch

from models.moe.dispatch.deep_ep import (
    no_groups,
    no_machine,
    no_package,
    no_peers,
)
from models.moe.dispatch.deep_ep_v2 import DISABLE_GIN
from models.moe.dispatch.deep_ep_v2_handle import FIELDS, VERSION

HIDDEN_STEP = 256
MAX_TOP_K = 32
CAPABILITY = (9, 0)

NCCL = (2, 30, 4)
"""The first whose device API it is written for."""
NEWER_NCCL = 'pip install --no-deps "nvidia-nccl-cu13>=2.30.4", and build DeepEP beside it'


def unavailable(
    world_size: int, local_world_size: int, hidden_size: int = HIDDEN_STEP, top_k: int = 1
) -> str | None:
    """Why DeepEP v2 can't run here, in one line; None if it can.

    world_size: ranks of an expert-parallel group. local_world_size: ranks on this node.
    """
    if (problem := no_machine(world_size)) is not None:
        return problem
    if (problem := no_groups(world_size, local_world_size)) is not None:
        return problem
    if world_size > local_world_size and os.environ.get(DISABLE_GIN, "0") != "0":
        return f"{DISABLE_GIN} switches off the networking that it needs between nodes: unset it"
    if hidden_size % HIDDEN_STEP:
        return f"hidden size {hidden_size}: it takes multiples of {HIDDEN_STEP}"
    if top_k > MAX_TOP_K:
        return f"top_k {top_k}: it takes up to {MAX_TOP_K}"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than Hopper, whose instructions it uses"
    problem = no_package("ElasticBuffer")
    nccl = loaded_nccl()
    # Of a package that is there, an old NCCL is why it does not load.
    if nccl is not None and nccl < NCCL and (problem is None or "does not load" in problem):
        return f"NCCL {_dotted(nccl)} is loaded: it needs {_dotted(NCCL)} or newer; {NEWER_NCCL}"
    return problem or _unknown_handle() or no_peers(local_world_size)


def loaded_nccl() -> tuple[int, int, int] | None:
    """The version of the NCCL that PyTorch has loaded, which may be newer than the one that it was
    built with; None where there is none to ask."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD)
        library.ncclGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):  # not loaded, or linked into PyTorch
        return None
    return version.value // 10_000, version.value // 100 % 100, version.value % 100


def _unknown_handle() -> str | None:
    import deep_ep

    version = getattr(deep_ep, "__version__", "unknown")
    handle = getattr(deep_ep, "EPHandle", None)
    if handle is None:
        return f"deep_ep {version} exports no EPHandle: install {VERSION}"
    others = set(inspect.signature(handle).parameters) ^ FIELDS
    if not others:
        return None
    wanted = "rebuild it from a commit that has" if version == VERSION else "install"
    return (
        f"deep_ep {version} has another handle than is known here ({', '.join(sorted(others))}): "
        f"{wanted} that of {VERSION}"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
