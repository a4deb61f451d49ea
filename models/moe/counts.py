"""What the MoE layers of this process count, so that claims are checked in every run."""

from dataclasses import dataclass

from torch import Tensor

from models.fp8.tensor import relayouts


@dataclass
class Counts:
    """Sums over layers and micro-batches since the last `reset`."""

    forward_passes: int = 0
    """Forward passes of one MoE layer."""
    backward_passes: int = 0
    kept_bytes: int = 0
    """Activations that layers kept for the backward pass, in forward passes that have one. Weights
    are not counted: the FP8 paths also keep theirs quantized."""
    kept_passes: int = 0
    dropped_rows: Tensor | int = 0
    """Copies of tokens that found no room with their experts on this rank; on the device."""

    def metrics(self) -> dict[str, float]:
        """Per MoE layer and pass: relayouts of scales, and MiB of activations kept for backward."""
        metrics = {}
        if self.forward_passes:
            metrics["moe/scale_relayouts"] = relayouts.forward / self.forward_passes
        if self.backward_passes:
            metrics["moe/scale_relayouts_backward"] = relayouts.backward / self.backward_passes
        if self.kept_passes:
            metrics["moe/kept_mib"] = self.kept_bytes / self.kept_passes / 2**20
        return metrics

    def reset(self) -> None:
        self.forward_passes = self.backward_passes = self.kept_bytes = self.kept_passes = 0
        self.dropped_rows = 0
        relayouts.reset()
