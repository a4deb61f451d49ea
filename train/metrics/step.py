"""Metrics of the model's steps: loss, gradient norm, routing, relayouts, bytes sent."""

from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
import torch.distributed as dist

from models.gpt import GPT
from train import parallel
from train.metrics import auxiliary
from train.metrics.routing import RoutingHealth

Count = torch.Tensor | dict[str, int] | int


class Gathered(TypedDict):
    """What is gathered and not yet collected, on the CPU, for a checkpoint."""

    steps: int
    skipped: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    expert_load: list[torch.Tensor]
    auxiliary: dict[str, torch.Tensor]
    counts: dict[str, Count]
    relayouts: NotRequired[dict[str, int]]
    """Only in older checkpoints, where they were not yet one of the counts."""
    bytes_sent: int
    redone: NotRequired[int]
    """Missing in checkpoints from before `moe.capacity=auto`."""
    waited: NotRequired[int]
    """Missing in checkpoints from before steps waited for lack of memory."""


class Mark(NamedTuple):
    """What a step's forward and backward passes add to, as it was before them, on the device."""

    buffers: list[torch.Tensor]
    auxiliary: dict[str, torch.Tensor]
    counts: dict[str, Any]
    sent: Any
    """The dispatcher's own."""


class StepMetrics:
    """The model's metrics, gathered on the device and read once per logging interval.

    Reading a number from a GPU waits for all the work queued on it.
    """

    def __init__(self, model: GPT, accumulation: int) -> None:
        self.layers = model.moe_layers()
        self.routing = RoutingHealth(self.layers)
        self.runtime = model.runtime
        # What this process did before does not count for this run.
        self.runtime.counts.reset()
        auxiliary.clear()
        self.accumulation = accumulation
        self.steps = 0
        self.skipped = 0
        self.redone = 0
        self.waited = 0
        """Steps whose layers waited because room for their rows would not have fitted."""
        self.loss = torch.zeros((), device=self.layers[0].expert_load.device)
        self.grad_norm = torch.zeros_like(self.loss)

    def collect(self, rate: float) -> dict[str, float]:
        """Means over the steps since the last call, over all ranks."""
        dist.all_reduce(self.loss)
        metrics = {
            "optim/lr": rate,
            **self.routing.collect(),
            **self.runtime.counts.metrics(),
            "moe/dispatched_mib": self._dispatched_mib(),
            "moe/dropped_rows": self._dropped_rows(),
        }
        if (room := self.runtime.room) is not None:
            metrics["moe/redone_steps"] = self.redone
            metrics["moe/waited_steps"] = self.waited
            if room.share is not None:
                metrics["moe/room"] = room.share
        if self.steps > self.skipped:
            metrics["loss/train"] = float(self.loss) / (self.steps - self.skipped)
            metrics["optim/grad_norm"] = float(self.grad_norm)
        if self.skipped:
            metrics["optim/skipped_steps"] = self.skipped
        for name, key in (("load_balancing_loss", "loss/aux"), ("z_loss", "loss/z")):
            values = auxiliary.sums().get(name)
            if values is not None:
                mean = parallel.average(values).mean()
                metrics[key] = float(mean) / (self.steps * self.accumulation)
        auxiliary.clear()
        self.runtime.counts.reset()
        self.loss.zero_()
        self.steps = self.skipped = self.redone = self.waited = 0
        return metrics

    def mark(self) -> Mark:
        """What a step adds to before its optimizer, as copies on the device: nothing waits."""
        return Mark(
            [buffer.clone() for buffer in self._buffers()],
            {name: values.clone() for name, values in auxiliary.sums().items()},
            self.runtime.counts.mark(),
            self.runtime.dispatcher.mark(),
        )

    def rewind(self, mark: Mark) -> None:
        """Undo what has been added since."""
        for buffer, before in zip(self._buffers(), mark.buffers, strict=True):
            buffer.copy_(before)
        auxiliary.rewind(mark.auxiliary)
        self.runtime.counts.rewind(mark.counts)
        self.runtime.dispatcher.rewind(mark.sent)

    def _buffers(self) -> list[torch.Tensor]:
        """Counters of the MoE layers: the expert load, and whatever else a router counts."""
        return [buffer for layer in self.layers for buffer in layer.buffers()]

    def state(self) -> Gathered:
        """Copies of what is gathered and not yet collected."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "loss": self.loss.to("cpu", copy=True),
            "grad_norm": self.grad_norm.to("cpu", copy=True),
            "expert_load": [layer.expert_load.to("cpu", copy=True) for layer in self.layers],
            "auxiliary": {
                name: values.to("cpu", copy=True) for name, values in auxiliary.sums().items()
            },
            "counts": {name: _copied(n) for name, n in vars(self.runtime.counts).items()},
            "bytes_sent": self.runtime.dispatcher.bytes_sent,
            "redone": self.redone,
            "waited": self.waited,
        }

    def load_state(self, state: Gathered) -> None:
        """Continue gathering from what `state` returned."""
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.redone, self.waited = state.get("redone", 0), state.get("waited", 0)
        device = self.loss.device
        self.loss, self.grad_norm = state["loss"].to(device), state["grad_norm"].to(device)
        for layer, load in zip(self.layers, state["expert_load"], strict=True):
            layer.expert_load.copy_(load)
        for name, values in state["auxiliary"].items():
            auxiliary.keep(name, values.to(device))
        counts = dict(state["counts"])
        if "relayouts" in state:
            counts["relayouts"] = state["relayouts"]
        for name, value in counts.items():
            here = value.to(device) if isinstance(value, torch.Tensor) else value
            setattr(self.runtime.counts, name, here)
        self.runtime.dispatcher.bytes_sent = state["bytes_sent"]

    def _dispatched_mib(self) -> float:
        """Data and scales sent between ranks in one step, in both dispatches, by all ranks."""
        dispatcher = self.runtime.dispatcher
        sent = torch.tensor(float(dispatcher.bytes_sent), device=self.loss.device)
        dispatcher.bytes_sent = 0
        dist.all_reduce(sent)
        return float(sent) / self.steps / 2**20

    def _dropped_rows(self) -> float:
        """Copies of tokens that were dropped for lack of room, in one step of all ranks."""
        dropped = torch.zeros_like(self.loss) + self.runtime.counts.dropped_rows
        dist.all_reduce(dropped)
        return float(dropped) / self.steps


def _copied(value: Count) -> Count:
    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True)
    return value.copy() if isinstance(value, dict) else value
