"""What is the same for both versions of DeepEP: where they can run, and which is installed.

    v1      `deep_ep.Buffer`          deep_ep_v1.py; NVSHMEM between nodes
    v2      `deep_ep.ElasticBuffer`   deep_ep_v2.py; NCCL's device API, and nothing else

Both are called `deep_ep`, and a Python environment holds one package of that name: v1.2.1 has
`Buffer` alone, and version 2, the repository's head, has both.
"""

from itertools import combinations

import torch
from torch import Tensor

GUIDE = "build it by its own guide: https://github.com/deepseek-ai/DeepEP"


def no_machine(world_size: int) -> str | None:
    """Why neither version can run with this many expert-parallel ranks; None if one can."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible"
    if world_size == 1:
        return "one expert-parallel rank has nobody to send to"
    return None


def no_groups(world_size: int, local_world_size: int) -> str | None:
    """Why groups of this many ranks don't lie on a node of this many each, or on several nodes."""
    inside = world_size <= local_world_size
    larger, smaller = max(world_size, local_world_size), min(world_size, local_world_size)
    if larger % smaller == 0:
        return None
    if inside:
        return (
            f"groups of {world_size} expert-parallel ranks don't divide a node's {local_world_size}"
        )
    return f"{world_size} expert-parallel ranks are not several whole nodes of {local_world_size}"


def no_package(name: str) -> str | None:
    """Why there is no `deep_ep.NAME`, in one line; None if there is."""
    try:
        import deep_ep
    except Exception as error:  # version 2 looks at CUDA and NCCL when it is imported, and asserts
        if isinstance(error, ModuleNotFoundError) and error.name == "deep_ep":
            return f"the package deep_ep is missing; {GUIDE}"
        return f"the package deep_ep does not load ({' '.join(str(error).split())}); {GUIDE}"
    if hasattr(deep_ep, name):
        return None
    version = getattr(deep_ep, "__version__", None)
    if hasattr(deep_ep, "Buffer"):
        return f"the package deep_ep that is installed is v1 and has no {name}; {GUIDE}"
    found = "is an empty one" if version is None else f"({version}) is another one"
    return f"the package deep_ep {found}: it has no {name}; uninstall it, and {GUIDE}"


def no_peers(local_world_size: int) -> str | None:
    """Which two GPUs of this node can't read each other, in one line; None if all can.

    Asks the driver, without making a context on any GPU.
    """
    for a, b in combinations(range(min(torch.cuda.device_count(), local_world_size)), 2):
        if not torch.cuda.can_device_access_peer(a, b):
            return f"GPU {a} can't read the memory of GPU {b}: it needs NVLink between all"
    return None


def half_of_the_multiprocessors() -> int:
    """An even number of them, of the current GPU."""
    return torch.cuda.get_device_properties().multi_processor_count // 4 * 2


class CountsBytes:
    """A dispatcher's counter of data and scales sent to other ranks, on the device."""

    def __init__(self, ranks: int, rank: int, device: str) -> None:
        self.ranks = ranks
        self._rank = rank
        self._bytes_per_rank = torch.zeros(ranks, dtype=torch.int64, device=device)

    @property
    def bytes_sent(self) -> int:
        """Since it was last set. Waits for the GPU."""
        return int(self._bytes_per_rank.sum() - self._bytes_per_rank[self._rank])

    @bytes_sent.setter
    def bytes_sent(self, value: int) -> None:
        self._bytes_per_rank.zero_()
        self._bytes_per_rank[self._rank - 1] = value  # anyone but this rank

    def mark(self) -> Tensor:
        return self._bytes_per_rank.clone()

    def rewind(self, mark: Tensor) -> None:
        self._bytes_per_rank.copy_(mark)

    def count(self, row_bytes: int, rows_per_rank: Tensor) -> None:
        """One small kernel: to ask how many rows there were would be to wait for the GPU."""
        self._bytes_per_rank.add_(rows_per_rank, alpha=row_bytes)


def check_bf16(x: Tensor) -> None:
    """Raises TypeError for rows that can't be combined."""
    if x.dtype is not torch.bfloat16:
        raise TypeError(f"DeepEP combines bfloat16 only, got {x.dtype}")


def as_argument(tensors: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, Tensor]:
    """Their way to say data, or data and scales, whose strides they read."""
    if len(tensors) > 2:
        raise ValueError(f"DeepEP sends data and scales, got {len(tensors)} tensors")
    data = tensors[0].contiguous()
    return data if len(tensors) == 1 else (data, tensors[1])


def as_tuple(received: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """What a dispatch of theirs gives, with or without scales."""
    return received if isinstance(received, tuple) else (received,)
