"""Counters of this process's MoE layers, so that every run checks the claims."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Phase = Literal["forward", "backward"]


@dataclass
class Counts:
    """Sums over layers and micro-batches since the last `reset`.

    Plain integers where the host counts, because autograd runs backward in a thread of its own on a
    GPU, where thread-local or context variables would start from nothing.
    """

    relayouts: dict[Phase, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    """Passes whose only work was to re-arrange scales."""
    forward_passes: int = 0
    """Forward passes of one MoE layer; a recomputed one counts again."""
    backward_passes: int = 0
    kept_bytes: int = 0
    """Activations that layers kept for the backward pass, in forward passes that have one. Weights
    are not counted: the FP8 paths also keep theirs quantized."""
    kept_passes: int = 0
    dropped_rows: Tensor | int = 0
    """Copies of tokens that were dropped on this rank for lack of room; on the device."""

    def metrics(self) -> dict[str, float]:
        """Per MoE layer and pass: relayouts of scales, and MiB of activations kept for backward."""
        metrics = {}
        if self.forward_passes:
            metrics["moe/scale_relayouts"] = self.relayouts["forward"] / self.forward_passes
        if self.backward_passes:
            per_pass = self.relayouts["backward"] / self.backward_passes
            metrics["moe/scale_relayouts_backward"] = per_pass
        if self.kept_passes:
            metrics["moe/kept_mib"] = self.kept_bytes / self.kept_passes / 2**20
        return metrics

    def reset(self) -> None:
        vars(self).update(vars(Counts()))

    def mark(self) -> dict[str, Any]:
        """All counts as they are now; tensors are replaced, never written in place."""
        return {**vars(self), "relayouts": self.relayouts.copy()}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Continue counting from there."""
        vars(self).update({**mark, "relayouts": mark["relayouts"].copy()})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside the `with` is not counted."""
        before = self.mark()
        try:
            yield
        finally:
            self.rewind(before)
