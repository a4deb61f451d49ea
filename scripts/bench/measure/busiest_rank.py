"""How unevenly a router loads the expert-parallel ranks, in a model of ours or of megatron-core."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from train.parallel import Ranks


def busiest_rank(model: nn.Module, step: Callable[[], object], ranks: Ranks) -> float | None:
    """Rows of the rank with most, over the mean of those that share its experts: the mean of all
    routers' calls in `step`.

    None where no router is called, as without experts, or in a CUDA graph. All ranks together.
    """
    with _chosen(model) as counts:
        step()
    if not counts:
        return None
    group = ranks.mesh["ep"].get_group()
    of_experts = torch.stack(counts)  # [calls, experts]
    dist.all_reduce(of_experts, group=group)
    of_ranks = of_experts.unflatten(1, (dist.get_world_size(group), -1)).sum(2).double()
    share = (of_ranks.amax(1) / of_ranks.mean(1)).mean()
    dist.all_reduce(share, dist.ReduceOp.MAX)  # of all replicas
    return float(share)


@contextmanager
def _chosen(model: nn.Module) -> Iterator[list[Tensor]]:
    """How many tokens chose each expert, int64 [experts], a call of a router each."""
    counts: list[Tensor] = []

    def note(router: TopKRouter, arguments: tuple, output: tuple[Tensor, Tensor]) -> None:
        chosen = output[1]  # the stock router gives a map [T, experts], ours lists [T, top_k]
        if chosen.dtype is torch.bool:
            counts.append(chosen.sum(0))
        else:
            experts = router.config.num_moe_experts
            counts.append(torch.bincount(chosen.flatten(), minlength=experts))

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, TopKRouter)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
