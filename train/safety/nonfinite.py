"""A loss, gradient or weight that is NaN or infinite never passes silently, nor an infinity inside
the experts that FP8 hides from all of them.

The device records it, and the host reads the record when it waits for the device anyway: when
metrics are logged and before anything is saved. So a healthy step waits for nothing, and the report
still names the first bad step. Nothing is saved after it.
"""

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from models.fp8 import overflow
from models.gpt import GPT
from train.config import Config
from train.failure import RESUMES, NotFinite
from train.parallel import Ranks

log = logging.getLogger(__name__)

NEVER = 2**62

NAN, INFINITE, HIDDEN = 1, 2, 3
"""What was found; HIDDEN is an infinity inside the experts."""

ADVICE = "Lower optim.lr, or set train.on_nonfinite=skip to leave such steps out"


class LossGuard:
    """Watches every micro-batch's loss and every step's gradient norm."""

    def __init__(self, config: Config, ranks: Ranks, model: GPT) -> None:
        self.config, self.ranks, self.model = config, ranks, model
        self.accumulation = config.accumulation(ranks.world_size)
        self.step = 0
        self.skipped_in_a_row = 0
        self._first = torch.full((), NEVER, dtype=torch.int64, device=ranks.device)
        self._kind = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._this_step = torch.zeros((), dtype=torch.bool, device=ranks.device)
        self._hidden = overflow.note_on(ranks.device).zero_()

    def begin(self, step: int) -> None:
        """Step `step`, counted from 0, starts."""
        self.step = step
        self._this_step.zero_()

    def mark(self) -> tuple[Tensor, Tensor]:
        """What is recorded of the steps before this one, which has started."""
        return self._first.clone(), self._kind.clone()

    def rewind(self, mark: tuple[Tensor, Tensor]) -> None:
        """Forget what this step has recorded."""
        self._first, self._kind = mark
        self._this_step.zero_()
        self._hidden.zero_()

    def note(self, micro_batch: int, value: Tensor) -> None:
        """A loss of this rank whose backward pass is done, or with `micro_batch` = accumulation the
        gradient's norm."""
        value = value.detach()
        kind = value.isnan() * NAN + value.isinf() * INFINITE
        kind = torch.where(value.isfinite() & (self._hidden != 0), HIDDEN, kind)
        self._hidden.zero_()
        bad = kind != 0
        self._this_step |= bad
        place = self.step * (self.accumulation + 1) + micro_batch
        is_first = bad & (self._first == NEVER)
        self._kind = torch.where(is_first, kind, self._kind)
        self._first = torch.where(is_first, place, self._first)

    def skips_this_step(self) -> bool:
        """With `train.on_nonfinite=skip`: whether any rank has met one in this step, which is
        reported.

        Raises TrainingFailed after `train.nonfinite_limit` of them in a row.
        """
        if self.config.train.on_nonfinite != "skip":
            return False
        bad = self._this_step.int()
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        if not bad:
            self.skipped_in_a_row = 0
            return False
        report, limit = self._report(), self.config.train.nonfinite_limit
        self._first.fill_(NEVER)
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= limit:
            raise NotFinite(
                f"{report}; the last of train.nonfinite_limit={limit} skipped steps in a row, in "
                f"which nothing was saved; lower optim.lr and start again, which {RESUMES}"
            )
        if self.skipped_in_a_row == 1 and self.ranks.is_first:
            log.warning(
                "%s; its update is skipped, and so are those of more such steps right after it, "
                "up to train.nonfinite_limit=%d",
                report,
                limit,
            )
        return True

    def check(self) -> None:
        """Raise NotFinite on every rank if any has met one. Waits for the device."""
        report = self._report()
        if report:
            raise NotFinite(f"{report}; nothing was saved after it. {ADVICE}")
        if self._weights_overflow():
            raise NotFinite(
                f"a weight of the experts is not finite in bfloat16 after step {self.step + 1}; "
                f"nothing was saved after it. Lower optim.lr and start again, which {RESUMES}"
            )

    def _weights_overflow(self) -> bool:
        """Whether those of any rank do: quantized, an infinite one looks like any other."""
        largest = torch.stack(
            torch._foreach_norm(self.model.local_expert_weights(), torch.inf)  # type: ignore[attr-defined]
        ).max()
        bad = (~(largest <= torch.finfo(torch.bfloat16).max)).int()
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        return bool(bad)

    def _report(self) -> str | None:
        """The first one among all ranks, in words."""
        own = torch.stack([self._first, self._kind])
        every = [torch.empty_like(own) for _ in range(self.ranks.world_size)]
        dist.all_gather(every, own)
        found = [(*one.tolist(), rank) for rank, one in enumerate(every)]
        place, kind, rank = min(found, key=lambda one: (one[0], one[2]))
        if place >= NEVER:
            return None
        step, micro = divmod(place, self.accumulation + 1)
        what = "nan" if kind == NAN else "infinite"
        if micro == self.accumulation:
            return f"the gradient of step {step + 1} is {what}, though its losses are finite"
        size = self.config.train.micro_batch
        first = step * self.config.global_batch(self.ranks.world_size)
        first += (micro * self.ranks.world_size + rank) * size
        if kind == HIDDEN:
            said = f"step {step + 1} has an infinity inside the experts, which FP8 hides"
        else:
            said = f"the loss of step {step + 1} is {what}"
        return (
            f"{said}: rank {rank}, micro-batch {micro}, which holds "
            f"sequences {first} to {first + size - 1} of the training order"
        )
