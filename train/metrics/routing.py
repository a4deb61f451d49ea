"""Routing health: does every expert get its share of the tokens, and how sure is the router?

All of it comes from counters on the device, read once a logging interval; the entropy of the
router is taken in the interval's last step alone.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from models.moe.layer import ExpertParallelMoE
from train import parallel
from train.metrics.metrics_file import LoadRow


class RoutingHealth:
    """Routing metrics of all MoE layers and ranks together, one logging interval at a time.

    `load` float64 [layers, experts] is the last interval's: the tokens that each expert got, over
    the mean of its layer. 1 everywhere is even.
    """

    def __init__(self, layers: Sequence[ExpertParallelMoE]) -> None:
        self.layers = layers
        self.load: torch.Tensor | None = None

    def watch(self, entropy: bool) -> None:
        """Whether the steps from here on measure the router's entropy."""
        for layer in self.layers:
            layer.router.measures_entropy = entropy

    def collect(self) -> dict[str, float]:
        """Metrics since the last call.

        moe/max_expert_load   the busiest expert's tokens over the mean, in the worst layer
        moe/load_entropy      of the layer whose load is the most uneven; 1 is even, 0 one expert
        moe/router_entropy    of one token's probabilities, mean of layers; 1 is undecided, 0 sure
        moe/expert_bias_max   the largest bias of an expert, up or down (moe.expert_bias)
        """
        counts = torch.stack([layer.expert_load for layer in self.layers])
        dist.all_reduce(counts)
        for layer in self.layers:
            layer.expert_load.zero_()
        shares = counts.double() / counts.sum(1, keepdim=True)
        experts = counts.shape[1]
        self.load = shares * experts
        entropy = torch.special.entr(shares).sum(1) / math.log(max(experts, 2))
        metrics = {
            "moe/max_expert_load": float(self.load.max()),
            "moe/load_entropy": float(entropy.min()),
        }
        every = [layer.router.entropy for layer in self.layers]
        measured = [value for value in every if value is not None]
        if len(measured) == len(every):
            metrics["moe/router_entropy"] = float(parallel.average(torch.stack(measured)).mean())
        if self.layers[0].router.has_expert_bias:
            biases = torch.stack([layer.router.expert_bias for layer in self.layers])
            metrics["moe/expert_bias_max"] = float(biases.abs().max())
        return metrics

    def row(self, step: int) -> LoadRow:
        """The last interval's load as a line of `routing.jsonl`."""
        assert self.load is not None, "collect comes first"
        load = [[round(value, 4) for value in layer] for layer in self.load.tolist()]
        return {"progress/step": step, "moe/expert_load": load}
