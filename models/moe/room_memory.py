"""Whether room for the experts' rows would fit into a GPU's memory, before it is reserved.

In a step the memory in use rises by what rows take and by a rest, which is the same whatever the
routing. Each rank measures the rest: from how far memory rose in an attempt, and from the rows that
its layers had in it. So it knows what more rows would make of the peak. The rest is taken to be
largest where the backward pass begins, at the last layer, when everything is kept.

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
MARGIN = 0.03
"""Share of the memory that is left alone: for gaps between tensors, for kernels that are loaded
late, and for what DeepEP receives, of which a layer that does not wait has room for the most."""
UNKNOWN = 2**62


class Memory(Protocol):
    """What PyTorch's allocator counts on this rank, in bytes."""

    def allocated(self) -> int:
        """Now in tensors."""

    def peak(self) -> int:
        """The most there has been in tensors since somebody began to count."""

    def limit(self) -> int:
        """The most that tensors may take."""


class GpuMemory:
    """A GPU's. The allocator's counters are the host's, and kept when memory is asked for: reading
    them waits for nothing."""

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

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
    """What rows take beside all else on this rank, and what the ranks agreed on."""

    AGREED = 3
    """Numbers that are agreed on, each as the largest of all ranks."""

    def __init__(self, layers: int, memory: Memory) -> None:
        self._memory = memory
        self._rows = [UNKNOWN] * layers  # fewest of the attempt's micro-batches, of each layer
        self._row = RowBytes(0, 0)
        self._rest: int | None = None
        self._allocated = self._peak = self._limit = self._attempts = 0
        self._agreed, self._agreed_row = UNKNOWN, RowBytes(0, 0)

    @property
    def is_known(self) -> bool:
        """Whether every rank has seen a whole step, and said so."""
        return self._agreed < UNKNOWN

    def begin(self) -> None:
        """An attempt at a step begins."""
        self._allocated, self._peak = self._memory.allocated(), self._memory.peak()
        self._rows = [UNKNOWN] * len(self._rows)

    def note(self, layer: int, rows: int, row: RowBytes) -> None:
        """A layer has P = `rows` in a micro-batch of the attempt."""
        self._rows[layer] = min(self._rows[layer], rows)
        self._row = RowBytes(*map(max, self._row, row))

    def end(self) -> None:
        """The attempt's last backward pass is queued, so that its peak is known."""
        if self._attempts % LOOK == 0:
            self._limit = self._memory.limit()
        self._attempts += 1
        # At the last layer, though the peak may be at another: so the rest is not underestimated.
        took = self._row.at(len(self._rows) - 1, self._rows)
        peak = self._memory.peak()
        rest = peak - self._allocated - took
        if self._rest is None or peak > self._peak:
            self._rest = rest
        else:  # a peak of an earlier step, or of the optimizer: an upper bound
            self._rest = min(self._rest, rest)

    def to_agree(self) -> tuple[int, int, int]:
        """Bytes beside rows that are over the limit, most often negative; and a row's bytes."""
        if self._rest is None:
            return UNKNOWN, *self._row
        return self._allocated + self._rest - self._limit, *self._row

    def agree(self, most: Sequence[int]) -> None:
        """The largest of all ranks' `to_agree`."""
        self._agreed, self._agreed_row = most[0], RowBytes(*most[1:])

    def fits(self, rows: Sequence[int]) -> bool:
        """Whether a step fits in which the layers have P rows; the same on every rank."""
        most = max(self._agreed_row.at(layer, rows) for layer in range(len(rows)))
        return self._agreed + most <= 0
