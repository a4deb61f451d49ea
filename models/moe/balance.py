"""An even load without an auxiliary loss: `moe.expert_bias`.

Each expert has a bias that is added to its logit where experts are chosen, and nowhere else: the
weights of the chosen are those of the logits alone, and it gets no gradient. After a step the bias
of an expert that got less than the mean rises by a fixed rate, and that of one that got more falls.

Source: Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts,
arXiv:2408.15664, algorithm 1. There it is added to sigmoids, as in megatron-core, whose own
`moe_router_enable_expert_bias` takes nothing else. Here the chosen are weighed by a softmax, so it
is added to logits: a bias b is a factor exp(b) of an expert's probability.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from models.moe.layer import ExpertParallelMoE


@torch.no_grad()
def update(layers: Sequence[ExpertParallelMoE], rate: float) -> None:
    """Update the biases after an optimizer step, from the tokens that each expert got in it, over
    all ranks and micro-batches, and reset these counts. All ranks together; nothing waits for the
    device."""
    load = torch.stack([layer.router.step_load for layer in layers])
    dist.all_reduce(load)
    # In integers, so that the bias of an expert that got exactly the mean does not change.
    lacking = load.sum(1, keepdim=True) - load * load.shape[1]
    for layer, sign in zip(layers, lacking.sign(), strict=True):
        layer.router.expert_bias.add_(sign, alpha=rate)
    forget(layers)


def forget(layers: Sequence[ExpertParallelMoE]) -> None:
    """Discard the counts of a step that is skipped."""
    for layer in layers:
        layer.router.step_load.zero_()
