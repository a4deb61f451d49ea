"""A step whose layers wait for nothing, repeated where rows did not fit: `moe.capacity=auto`.

Room for the experts' rows is reserved by what recent steps needed (models/moe/room.py). Whether a
layer lost rows is known when the last backward pass has been queued, before the optimizer. Then the
attempt is discarded, with all that it counted and drew, and the step is repeated on the same
micro-batches with every layer waiting, so it runs at most twice. Nothing is dropped, and losses,
gradients and counts are those of a run that always waits.

A step whose room would not fit into a GPU's memory waits in every layer, and runs once.
"""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from models.moe.room import Room
from train.checkpoint import rng
from train.metrics.step import StepMetrics
from train.safety.nonfinite import LossGuard

log = logging.getLogger(__name__)


def at_most_twice(
    attempt: Callable[[], Tensor],
    room: Room,
    metrics: StepMetrics,
    guard: LossGuard,
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """Run `attempt`, forward and backward of a step's micro-batches, until no row is lost; returns
    its result, and leaves gradients in the parameters. All ranks together."""
    device = metrics.loss.device
    before = (metrics.mark(), guard.mark(), rng.drawn(device)) if room.is_known else None
    with room.open(wait=before is None):
        result = attempt()
    if room.too_large is not None:
        metrics.waited += 1
        say_once(room)
    if not room.ran_out():
        return result
    assert before is not None, "a step that waits loses no rows"
    counted, noted, drawn = before
    # All of them: the last micro-batch's have been reduced, so FSDP keeps none back.
    optimizer.zero_grad(set_to_none=True)
    metrics.rewind(counted)
    guard.rewind(noted)
    rng.redraw(drawn, device)
    metrics.redone += 1
    with room.open(wait=True):
        result = attempt()
    assert not room.ran_out()
    return result


def say_once(room: Room) -> None:
    """The first time that room would not have fitted, rank 0 says what is done instead."""
    if room.times_too_large == 1 and dist.get_rank() == 0:
        log.warning(
            "room for %.2f even shares of rows would not fit into a GPU's memory "
            "(moe.capacity=auto): in such steps every layer waits for the count of its rows, which "
            "takes longer; moe/waited_steps counts them, a smaller train.micro_batch avoids them",
            room.too_large,
        )
