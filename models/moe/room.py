"""Room for the rows of a rank's experts where no layer waits to count them: `moe.capacity=auto`.

Buffers are allocated on the host and their size P depends on the routing, which is on the device.
So P follows from what recent steps needed; a layer that needs more loses rows, and the step is
repeated with every layer waiting (train/dropless.py). What was needed is the largest of all layers,
micro-batches and ranks, kept on the device, so that nothing waits to find out and all ranks agree.
Where room would not fit into a GPU's memory (room_memory.py), every layer of the step waits too.
"""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from models.config import MoEConfig
from models.fp8.reference.plan_rows import most_rows
from models.fp8.tensor import ceil_div
from models.moe.room_memory import Memory, RoomMemory, RowBytes, memory_of

WINDOW = 20
"""Steps whose need is remembered: after this many the largest is dropped, and room may shrink."""
PARTS = 16
"""Room grows and shrinks by this part of a rank's even share: few sizes, so that the allocator
reuses their memory and does not fragment."""
SPARE, MOST_SPARE = 8, 4
"""What is added to the largest need: the largest surprise that is remembered, but at least the
first of these parts of the even share, an eighth, and at most the second, a quarter."""
SURPRISES = 100
"""Steps whose surprise is remembered: by how much the layer with the largest needed more than in
the window before. If these were drawn alike, one step of a hundred would surprise more than all of
these.

Routing changes by leaps, early in a run and in one layer or another, so a surprise counts for all.
In seven records of natural routing (docs/results/room_needs*.json: 2, 4 and 8 ranks, 120 to 160
steps), an eighth always would have repeated 44 of 1,080 steps, 16 of them after the twentieth; this
would have repeated 20 and 2, in 0.02 to 0.06 shares more at 2 ranks and 0.1 to 0.12 at 4 and 8,
where needs leap further. On two H100s an eighth repeated 3 of 30 (docs/performance.md)."""


def most_needed(tokens: int, top_k: int, local_experts: int, alignment: int) -> int:
    """P of a layer for the worst routing of `tokens`, those of all ranks of the group."""
    slots = tokens * min(top_k, local_experts)
    return most_rows(slots, local_experts, alignment) // alignment * alignment


def fixed_rows(capacity: float, even: int, most: int, local_experts: int, alignment: int) -> int:
    """P of a layer by a number of `moe.capacity`: that many times a rank's even share, and what
    rounding up each expert's rows may take; no more than `most`, which no routing exceeds."""
    share = math.ceil(min(even * capacity, most) / alignment)
    return min((share + local_experts) * alignment, most)


def coarse_rows(rows: int, even: int, most: int, alignment: int) -> int:
    """P of a layer with room for `rows`: whole `PARTS` of a rank's even share, `most` at most."""
    step = ceil_div(ceil_div(even, PARTS), alignment) * alignment
    return min(ceil_div(rows, step) * step, most)


class Asked(NamedTuple):
    """What a layer's room follows from, in rows; see `Room.max_rows`."""

    even: int
    most: int
    alignment: int


class Room:
    """What the last steps needed, and the room that is reserved for the next.

    Every layer waits unless a step's attempt is `open`: only then is it checked afterwards whether
    rows were lost.
    """

    def __init__(self, layers: int, memory: Memory | None = None) -> None:
        """`memory` is this rank's; None where there is no limit."""
        self.rows: list[int | None] = [None] * layers
        """P of each layer in the attempt that is open, or in the last one; None where it waited."""
        self.share: float | None = None
        """The last P that were not waited for, as a multiple of a rank's even share of rows: their
        mean over the layers."""
        self.too_large: float | None = None
        """Of the attempt that is open, or of the last one: the room that would not fit into memory,
        as `share`; None where it fits, or was not wanted."""
        self.times_too_large = 0
        """Attempts so far whose room would not have fitted."""
        self._memory = None if memory is None else RoomMemory(layers, memory)
        self._asked: list[Asked | None] = [None] * layers  # the last time
        self._shares = [0.0] * layers
        self._needs: deque[list[int]] = deque(maxlen=WINDOW)  # of each layer
        self._surprises: deque[int] = deque(maxlen=SURPRISES)  # of the layer with most
        self._open = self._waits = False
        self._lately: list[int] = []  # the largest of `_needs`, of each layer
        self._surprise = 0  # the largest of `_surprises`
        # Of the attempt that is open, int64: of each layer, and then what memory wants to agree on.
        self._needed: Tensor | None = None
        self._elements: tuple[Tensor, ...] = ()  # int64 []
        self._on_host: Tensor | None = None  # where it is copied to
        self._copied: torch.cuda.Event | None = None

    @property
    def is_known(self) -> bool:
        """Whether a need is known; in the first step every layer waits."""
        return bool(self._needs)

    @contextmanager
    def open(self, wait: bool) -> Iterator[None]:
        """An attempt at a step. With `wait` its layers wait, and nothing is lost; and so they do
        where room would not fit into memory."""
        self.rows = [None] * len(self.rows)
        self._lately = [max(needs) for needs in zip(*self._needs, strict=True)]
        self._surprise = max(self._surprises, default=0)
        self._open, self._waits, self.too_large = True, wait or not self.is_known, None
        if not self._waits and self._memory is not None:
            self._waits = self._would_not_fit(self._memory)
        if self._needed is not None:
            self._needed.zero_()
        if self._memory is not None:
            self._memory.begin()
        try:
            yield
        finally:
            self._open = False

    def _would_not_fit(self, memory: RoomMemory) -> bool:
        """Whether memory forbids the room that layers would get; also as long as it is not known
        what else a step takes."""
        if not memory.is_known:
            return True
        asked = [layer for layer in self._asked if layer is not None]
        wanted = [self._wanted(layer, one) for layer, one in enumerate(asked)]
        if memory.fits(wanted):
            return False
        self.too_large = sum(wanted) / sum(one.even for one in asked)
        self.times_too_large += 1
        return True

    def max_rows(self, layer: int, even: int, most: int, alignment: int) -> int | None:
        """P for a layer, counted from 0, whose even share is `even` rows and which can need `most`:
        a multiple of `alignment`, or `most`; None if it is to wait."""
        if not self._open:
            return None
        asked = self._asked[layer] = Asked(even, most, alignment)
        if self._waits:
            return None
        rows = self.rows[layer]
        if rows is None:  # all micro-batches of an attempt get the same
            rows = self.rows[layer] = self._wanted(layer, asked)
            self._shares[layer] = rows / even
            self.share = sum(self._shares) / len(self._shares)
        return rows

    def _wanted(self, layer: int, asked: Asked) -> int:
        """Room by what was needed lately."""
        even = asked.even
        spare = min(max(self._surprise, ceil_div(even, SPARE)), ceil_div(even, MOST_SPARE))
        return coarse_rows(self._lately[layer] + spare, *asked)

    def note(self, layer: int, rows: Tensor) -> None:
        """Note that a layer of the attempt needed this many, int64 []; on the device, so nothing
        waits."""
        if not self._open:
            return
        if self._needed is None:
            agreed = 0 if self._memory is None else RoomMemory.AGREED
            self._needed = rows.new_zeros(len(self.rows) + agreed)
            self._elements = self._needed.unbind()
        torch.maximum(self._elements[layer], rows, out=self._elements[layer])

    def note_memory(self, layer: int, rows: int, row: RowBytes) -> None:
        """Note that a layer of the attempt has P = `rows`, and what each of them takes."""
        if self._open and self._memory is not None:
            self._memory.note(layer, rows, row)

    def send(self) -> None:
        """After the attempt's last forward pass, with all ranks: the largest needs to the host.

        Before the backward pass, on the stream that computes: concurrently with DeepEP's kernels a
        collective of NCCL can wait forever, and they for it.
        """
        assert self._needed is not None, "no layer has noted what it needed"
        if self._memory is not None:
            mine = self._memory.to_agree()
            for element, value in zip(self._elements[len(self.rows) :], mine, strict=True):
                element.fill_(value)  # a kernel's argument: nothing is copied, or waits
        dist.all_reduce(self._needed, dist.ReduceOp.MAX)
        if self._on_host is None:
            pinned = self._needed.is_cuda
            self._on_host = torch.zeros_like(self._needed, device="cpu", pin_memory=pinned)
            self._copied = torch.cuda.Event() if pinned else None
        self._on_host.copy_(self._needed, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def ran_out(self) -> bool:
        """Whether a layer of any rank lost rows in the last attempt; the same on every rank.

        Remembers what was needed if none did: after lost rows later layers route differently. On a
        GPU waits for what `send` has queued, not for the backward pass after it.
        """
        assert self._on_host is not None, "`send` comes first"
        if self._copied is not None:
            self._copied.synchronize()
        found: list[int] = self._on_host.tolist()
        needed, agreed = found[: len(self.rows)], found[len(self.rows) :]
        if self._memory is not None:
            self._memory.agree(agreed)
            self._memory.end()
        if any(
            rows is not None and need > rows for need, rows in zip(needed, self.rows, strict=True)
        ):
            return True
        if self._lately:
            leaps = (need - lately for need, lately in zip(needed, self._lately, strict=True))
            self._surprises.append(max(leaps))
        self._needs.append(needed)
        return False


class Settled(NamedTuple):
    """What `moe.capacity` means on a machine; every layer waits where both are None."""

    capacity: float | None
    """A number that applies."""
    room: Room | None
    said: str
    """For the user; empty where there is nothing to say."""


def settle(
    moe: MoEConfig,
    layers: int,
    device: str,
    why_linear_waits: str | None,
    why_dispatch_waits: str | None,
) -> Settled:
    """For `cpu` or `cuda`, and what else makes the host wait in every layer, if anything does."""
    wanted = moe.capacity
    if wanted is None or (wanted == "default" and device == "cpu"):
        return Settled(None, None, "")
    if not isinstance(wanted, str):
        why = "a CPU has nothing to wait for" if device == "cpu" else why_linear_waits
        said = f"moe.capacity={wanted:g}"
        if why is None:
            said += f": {moe.path} drops rows beyond it, another function than with auto or null"
            return Settled(wanted, None, said)
        said += f" is ignored, as {why}: {moe.path} drops nothing, as with null"
        if device == "cuda":
            said += ", another function than a path to which it applies"
        return Settled(None, None, said)
    why = why_linear_waits
    if wanted == "default":  # asked for by name, it applies although something else waits
        why = why or why_dispatch_waits
    if why is not None:
        return Settled(None, None, f"every layer waits for the count of its rows, as {why}")
    said = "room for the experts' rows by what was needed lately (moe.capacity=auto)"
    if why_dispatch_waits is not None and device == "cuda":
        said += f"; every layer waits anyway, as {why_dispatch_waits}"
    return Settled(None, Room(layers, memory_of(device)), said)
