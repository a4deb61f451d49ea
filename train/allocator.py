"""How PyTorch divides CUDA memory: in segments that grow, unless the environment says otherwise.

Sizes of activations follow the routing. From blocks of fixed sizes, much would stay reserved that
fits nothing any more; a segment that grows is one range of addresses, and has no such ends.

DeepEP allocates the buffers that it shares between processes past this allocator. What cannot be
shared or registered with NCCL is a tensor of such a segment.
"""

import os
from collections.abc import Mapping

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""PyTorch reads the first that is set; the second is the older name."""
GROWING = "expandable_segments:True"
REGISTERING = "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK"
"""Has PyTorch register all memory with NCCL, which it gives up where segments grow."""


def choose() -> None:
    """Set what is not set. Before PyTorch is loaded, which reads it once."""
    os.environ.update(default(os.environ))


def default(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment; nothing where it says something of this itself."""
    registers = environment.get(REGISTERING, "0").lower() not in ("", "0", "n", "no", "f", "false")
    if registers or any(name in environment for name in NAMES):
        return {}
    return {NAMES[0]: GROWING}


def setting() -> str | None:
    """What this process's allocator is told; None where nothing is, and it does what it does."""
    return next((os.environ[name] for name in NAMES if name in os.environ), None)
