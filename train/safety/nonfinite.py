"""A loss or gradient that is NaN or infinite never passes in silence.

The device notes it, and the host reads the note when it waits for the device anyway: where metrics
are logged and before anything is saved. So a healthy step waits for nothing, and the report still
names the first bad step. Nothing is saved after it.
"""

import logging
import math

import torch
import torch.distributed as dist
from torch import Tensor

from train.config import Config
from train.failure import TrainingFailed
from train.parallel import Ranks

log = logging.getLogger(__name__)

NEVER = 2**62


class LossGuard:
    """Watches every micro-batch's loss and every step's gradient norm."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.accumulation = config.accumulation(ranks.world_size)
        self.step = 0
        self._first = torch.full((), NEVER, dtype=torch.int64, device=ranks.device)
        self._value = torch.zeros((), device=ranks.device)
        self._this_step = torch.zeros((), dtype=torch.bool, device=ranks.device)

    def begin(self, step: int) -> None:
        """Step `step`, counted from 0, begins."""
        self.step = step
        self._this_step.zero_()

    def note(self, micro_batch: int, value: Tensor) -> None:
        """A loss of this rank, or with `micro_batch` = accumulation the gradient's norm."""
        bad = ~value.detach().isfinite()
        self._this_step |= bad
        place = self.step * (self.accumulation + 1) + micro_batch
        is_first = bad & (self._first == NEVER)
        self._value = torch.where(is_first, value.detach().float(), self._value)
        self._first = torch.where(is_first, place, self._first)

    def skips_this_step(self) -> bool:
        """With `train.on_nonfinite=skip`: whether any rank has met one in this step; says so."""
        if self.config.train.on_nonfinite != "skip":
            return False
        bad = self._this_step.int()
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        if not bad:
            return False
        report = self._report()
        if self.ranks.is_first:
            log.warning("%s; its update is skipped", report)
        self._first.fill_(NEVER)
        return True

    def check(self) -> None:
        """Raise TrainingFailed on every rank if any has met one. Waits for the device."""
        report = self._report()
        if report:
            raise TrainingFailed(
                f"{report}; nothing was saved after it. Lower optim.lr, or set "
                "train.on_nonfinite=skip to leave such steps out"
            )

    def _report(self) -> str | None:
        """The first one among all ranks, in words."""
        own = torch.stack([self._first.double(), self._value.double()])
        every = [torch.empty_like(own) for _ in range(self.ranks.world_size)]
        dist.all_gather(every, own)
        found = [(int(place), rank, float(v)) for rank, (place, v) in enumerate(every)]
        place, rank, value = min(found, key=lambda one: one[:2])
        if place >= NEVER:
            return None
        step, micro = divmod(place, self.accumulation + 1)
        what = "nan" if math.isnan(value) else "infinite"
        if micro == self.accumulation:
            return f"the gradient of step {step + 1} is {what}, though its losses are finite"
        size = self.config.train.micro_batch
        first = step * self.config.global_batch(self.ranks.world_size)
        first += (micro * self.ranks.world_size + rank) * size
        return (
            f"the loss of step {step + 1} is {what}: rank {rank}, micro-batch {micro}, which holds "
            f"sequences {first} to {first + size - 1} of the training order"
        )
