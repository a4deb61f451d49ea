"""Room for the rows of a rank's experts where no layer waits to count them: `moe.capacity=auto`.

Buffers are allocated on the host and their size P depends on the routing, which is on the device.
So P follows from what recent steps needed; a layer that needs more loses rows, and the step is
repeated with every layer waiting (train/dropless.py). What was needed is the largest of all layers,
micro-batches and ranks, kept on the device, so that nothing waits to find out and all ranks agree.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from models.config import MoEConfig
from models.fp8.tensor import ceil_div

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


class Room:
    """What the last steps needed, and the room that is reserved for the next.

    Every layer waits unless a step's attempt is `open`: only then is it checked afterwards whether
    rows were lost.
    """

    def __init__(self, layers: int) -> None:
        self.rows: list[int | None] = [None] * layers
        """P of each layer in the attempt that is open, or in the last one; None where it waited."""
        self.share: float | None = None
        """The last P that were not waited for, as a multiple of a rank's even share of rows: their
        mean over the layers."""
        self._shares = [0.0] * layers
        self._needs: deque[list[int]] = deque(maxlen=WINDOW)  # of each layer
        self._surprises: deque[int] = deque(maxlen=SURPRISES)  # of the layer with most
        self._open = self._waits = False
        self._lately: list[int] = []  # the largest of `_needs`, of each layer
        self._needed: Tensor | None = None  # int64 [layers], of the attempt that is open
        self._of_layer: tuple[Tensor, ...] = ()  # its elements, int64 []
        self._on_host: Tensor | None = None  # where it is copied to
        self._copied: torch.cuda.Event | None = None

    @property
    def is_known(self) -> bool:
        """Whether a need is known; in the first step every layer waits."""
        return bool(self._needs)

    @contextmanager
    def open(self, wait: bool) -> Iterator[None]:
        """An attempt at a step. With `wait` its layers wait, and nothing is lost."""
        self.rows = [None] * len(self.rows)
        self._open, self._waits = True, wait or not self.is_known
        self._lately = [max(needs) for needs in zip(*self._needs, strict=True)]
        if self._needed is not None:
            self._needed.zero_()
        try:
            yield
        finally:
            self._open = False

    def max_rows(self, layer: int, even: int, most: int, alignment: int) -> int | None:
        """P for a layer, counted from 0, whose even share is `even` rows and which can need `most`:
        a multiple of `alignment`, or `most`; None if it is to wait."""
        if not self._open or self._waits:
            return None
        rows = self.rows[layer]
        if rows is None:  # all micro-batches of an attempt get the same
            step = ceil_div(ceil_div(even, PARTS), alignment) * alignment
            surprise = max(self._surprises, default=0)
            spare = min(max(surprise, ceil_div(even, SPARE)), ceil_div(even, MOST_SPARE))
            wanted = self._lately[layer] + spare
            rows = self.rows[layer] = min(ceil_div(wanted, step) * step, most)
            self._shares[layer] = rows / even
            self.share = sum(self._shares) / len(self._shares)
        return rows

    def note(self, layer: int, rows: Tensor) -> None:
        """Note that a layer of the attempt needed this many, int64 []; on the device, so nothing
        waits."""
        if not self._open:
            return
        if self._needed is None:
            self._needed = rows.new_zeros(len(self.rows))
            self._of_layer = self._needed.unbind()
        torch.maximum(self._of_layer[layer], rows, out=self._of_layer[layer])

    def send(self) -> None:
        """After the attempt's last forward pass, with all ranks: the largest needs to the host.

        Before the backward pass, on the stream that computes: concurrently with DeepEP's kernels a
        collective of NCCL can wait forever, and they for it.
        """
        assert self._needed is not None, "no layer has noted what it needed"
        dist.all_reduce(self._needed, dist.ReduceOp.MAX)
        if self._on_host is None:
            pinned = self._needed.is_cuda
            self._on_host = self._needed.new_zeros(len(self.rows), device="cpu", pin_memory=pinned)
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
        needed: list[int] = self._on_host.tolist()
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
        said += f" is ignored, as {why}: {moe.path} drops nothing, another function than a path "
        return Settled(None, None, f"{said}to which it applies")
    why = why_linear_waits
    if wanted == "default":  # asked for by name, it applies although something else waits
        why = why or why_dispatch_waits
    if why is not None:
        return Settled(None, None, f"every layer waits for the count of its rows, as {why}")
    said = "room for the experts' rows by what was needed lately (moe.capacity=auto)"
    if why_dispatch_waits is not None and device == "cuda":
        said += f"; every layer waits anyway, as {why_dispatch_waits}"
    return Settled(None, Room(layers), said)
