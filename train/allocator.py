"""How PyTorch divides CUDA memory: in segments that grow, unless the environment overrides it.

Sizes of activations depend on the routing. With blocks of fixed sizes, much memory would stay
reserved that fits nothing any more; a segment that grows is one range of addresses, without such
gaps.

DeepEP allocates the buffers that it shares between processes outside this allocator. Tensors in
such a segment cannot be shared, or registered with NCCL.
"""

import os
from collections.abc import Mapping

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""PyTorch reads the first that is set; the second is the older name."""
GROWING = "expandable_segments:True"
REGISTERING = "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK"
"""Makes PyTorch register all memory with NCCL, which it cannot where segments grow."""


def choose() -> None:
    """Set what is not set. Call it before PyTorch is loaded, which reads it once."""
    os.environ.update(default(os.environ))


def default(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment; nothing where it configures the allocator itself."""
    registers = environment.get(REGISTERING, "0").lower() not in ("", "0", "n", "no", "f", "false")
    if registers or any(name in environment for name in NAMES):
        return {}
    return {NAMES[0]: GROWING}


def setting() -> str | None:
    """The settings of this process's allocator; None where there are none, and it uses its
    defaults."""
    return next((os.environ[name] for name in NAMES if name in os.environ), None)
