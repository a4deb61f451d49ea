"""Whether room for the experts' rows would fit into a GPU's memory, before it is reserved.

At its peak a step takes what its rows take, and a rest that is the same whatever the routing. Each
rank measures the rest: from the peak of an attempt, and the rows that its layers had in it. So it
knows what more rows would make of the peak. That is taken to be where the backward pass begins and
everything is kept: at the last layer's experts, or at the loss. Which of them is not known, so a
step has to fit by both.

All ranks have to decide alike, or they would wait for each other: one that waits in a layer sends
counts first. So the rest over the rank's limit is agreed on, as the largest of all ranks, and so
are the bytes of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from models.fp8.tensor import ceil_div

LOOK = 20
"""Attempts after which the limit is read again: the driver is asked, and other libraries allocate
too."""
MARGIN = 0.02
"""Share of the memory that is left alone: for gaps between tensors, for kernels that are loaded
late, and for what DeepEP receives, of which a layer that does not wait has room for the most."""
UNKNOWN = 2**62


class Memory(Protocol):
    """What PyTorch's allocator counts on this rank, in bytes."""

    def peak(self) -> int:
        """The most there has been in tensors since somebody began to count."""

    def limit(self) -> int:
        """The most that tensors may take."""


class GpuMemory:
    """A GPU's. The allocator's counters are the host's, and kept when memory is asked for: reading
    them waits for nothing."""

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def limit(self) -> int:
        free, _ = torch.cuda.mem_get_info()
        return int((free + torch.cuda.memory_reserved()) * (1 - MARGIN))


def memory_of(device: str) -> Memory | None:
    """The memory of `cpu` or `cuda`; None where there is no limit to look at."""
    return GpuMemory() if device == "cuda" else None


class RowBytes(NamedTuple):
    """Bytes that a layer takes for each of its P rows."""

    kept: int
    """From its forward to its backward pass."""
    computing: int
    """Beside what is kept, at most, while the layer computes."""

    def at(self, layer: int, rows: Sequence[int]) -> int:
        """Bytes of all layers' rows in the backward pass of one layer: those after it have freed
        theirs."""
        return self.kept * sum(rows[: layer + 1]) + self.computing * rows[layer]


def row_bytes(
    rows: int, saved: int, hidden: int, ffn: int, value: int, recompute: bool
) -> RowBytes:
    """For a layer that had P = `rows` and saves `saved` bytes for its backward pass, or computes
    them again; `value` bytes a value that is not in FP8.

    No path holds more at once than three tensors [P, H] and five [P, F]: gradients of the experts'
    output and input, and what wgrad dequantizes; da, dh, and SwiGLU's result and dh in FP8.
    """
    each = ceil_div(saved, rows) if rows else 0
    computing = (3 * hidden + 5 * ffn) * value
    if recompute:  # the forward pass again: what it saves, and its result
        return RowBytes(0, computing + each + hidden * value)
    return RowBytes(each, computing)


class RoomMemory:
    """What a step takes beside its experts' rows on this rank, and what the ranks agreed on."""

    AGREED = 4
    """Numbers that are agreed on, each as the largest of all ranks."""

    def __init__(self, layers: int, memory: Memory) -> None:
        self._memory = memory
        self._rows = [0] * layers  # of the attempt's last micro-batch
        self._row = RowBytes(0, 0)
        # Of the attempt's micro-batch that took least: which had the peak is not known.
        self._took = (UNKNOWN, UNKNOWN)
        # By where the peak may be: at the last layer's experts, or at the loss.
        self._beside: tuple[int, int] | None = None
        self._attempts = self._peak = self._limit = 0
        self._over, self._agreed_row = (UNKNOWN, UNKNOWN), RowBytes(0, 0)

    @property
    def is_known(self) -> bool:
        """Whether every rank has seen a step that takes what all take, and said so."""
        return self._over[0] < UNKNOWN

    def begin(self) -> None:
        """An attempt at a step begins."""
        self._peak = self._memory.peak()
        self._took = (UNKNOWN, UNKNOWN)

    def note(self, layer: int, rows: int, row: RowBytes) -> None:
        """A layer has P = `rows` in a micro-batch of the attempt; layers come in their order."""
        self._rows[layer] = rows
        self._row = RowBytes(*map(max, self._row, row))
        if layer == len(self._rows) - 1:
            took = (self._row.at(layer, self._rows), self._row.kept * sum(self._rows))
            self._took = (min(self._took[0], took[0]), min(self._took[1], took[1]))

    def end(self) -> None:
        """The attempt's last backward pass is queued, so that its peak is known."""
        self._attempts += 1
        if self._attempts == 1:
            return  # before the optimizer has made its state
        if self._attempts % LOOK == 2:
            self._limit = self._memory.limit()
        peak = self._memory.peak()
        at_experts, at_loss = peak - self._took[0], peak - self._took[1]
        if self._beside is None or peak > self._peak:
            self._beside = (at_experts, at_loss)
        else:  # a peak of an earlier step, or of the optimizer: an upper bound
            self._beside = (min(self._beside[0], at_experts), min(self._beside[1], at_loss))

    def to_agree(self) -> tuple[int, int, int, int]:
        """Bytes beside rows that are over the limit, most often negative; and a row's bytes."""
        if self._beside is None:
            return UNKNOWN, UNKNOWN, *self._row
        at_experts, at_loss = self._beside
        return at_experts - self._limit, at_loss - self._limit, *self._row

    def agree(self, most: Sequence[int]) -> None:
        """The largest of all ranks' `to_agree`."""
        self._over, self._agreed_row = (most[0], most[1]), RowBytes(*most[2:])

    def fits(self, rows: Sequence[int]) -> bool:
        """Whether a step fits in which the layers have P rows; the same on every rank."""
        at_experts, at_loss = self._over
        row = self._agreed_row
        computing = max(row.at(layer, rows) for layer in range(len(rows)))
        return max(at_experts + computing, at_loss + row.kept * sum(rows)) <= 0
