"""A step whose layers wait for nothing, and the same step again where rows found no room:
`moe.capacity=auto`.

Room for the experts' rows is set aside from what was needed lately (models/moe/room.py). Whether a
layer lost rows is known when the last backward pass has been queued, before the optimizer. Then
what was computed is thrown away, with all that it has counted and drawn, and the step is done again
from its own micro-batches with every layer waiting, so at most twice. Nothing is dropped, and
losses, gradients and counts are those of a run that always waits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.moe.room import Room
from train.checkpoint import rng
from train.metrics.step import StepMetrics
from train.safety.nonfinite import LossGuard


def at_most_twice(
    attempt: Callable[[], Tensor],
    room: Room,
    metrics: StepMetrics,
    guard: LossGuard,
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """What `attempt`, forward and backward of a step's micro-batches, returns once no row is lost;
    its gradients are with the parameters. All ranks together."""
    device = metrics.loss.device
    before = (metrics.mark(), guard.mark(), rng.drawn(device)) if room.is_known else None
    with room.open(wait=before is None):
        result = attempt()
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
