"""The MoE layer between router and experts."""

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from models.moe.layer import ExpertParallelMoE, Router
from tests.models.test_gpt import build, configure
from tests.support.ranks import run_ranks

ALONE = ("parallel.expert_parallel=1", "moe.num_experts=8")


def stock(router: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
    """What megatron-core's own routing chooses: weights and a map, both [T, experts]."""
    return TopKRouter.routing(router, logits)


def chosen_and_passed_on(rank: int, config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For one layer whose router is very sure: megatron-core's map, the weights and experts that
    tokens are sent with, and how often the layer counts each expert."""
    layer = build(config).moe_layers()[0]
    sent = {}

    def experts(tokens, expert_ids, weights):
        sent["ids"], sent["weights"] = expert_ids, weights
        return torch.zeros_like(tokens)

    layer.experts.forward = experts  # type: ignore[method-assign]
    with torch.no_grad():
        layer.router.weight.mul_(1e5)
        hidden = torch.randn(64, 1, config.model.hidden_size)
        _, routing_map = stock(layer.router, layer.router.gating(hidden))
        layer(hidden)
        layer(hidden)
        layer.eval()(hidden)
    return routing_map, sent["ids"], sent["weights"], layer.expert_load


def test_tokens_go_to_the_experts_of_the_map():
    """Not those with the largest probabilities: a chosen one's may have underflowed to 0."""
    ((routing_map, ids, weights, load),) = run_ranks(1, chosen_and_passed_on, configure(*ALONE))
    assert (weights == 0).sum() > 32, "no probability has underflowed"
    sent = torch.zeros_like(routing_map).scatter(1, ids, True)
    assert torch.equal(sent, routing_map)
    assert torch.equal(load, 2 * routing_map.sum(0)), "validation is not counted"


def searched_for(router: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and experts out of what the stock routing has spread over all experts."""
    probs, routing_map = stock(router, logits)
    ids = probs.detach().masked_fill(~routing_map, -1).topk(router.topk).indices
    return probs.gather(1, ids), ids


def routed_both_ways(rank: int, config) -> list[tuple[Tensor, Tensor]]:
    """Weights, experts and the logits' gradient, by our routing and out of the stock one's."""
    layer: ExpertParallelMoE = build(config).moe_layers()[0]
    logits = torch.randn(64, 8, config.moe.num_experts) * 3
    found = []
    for way in (Router.routing, searched_for):
        leaf = logits.clone().requires_grad_()
        weights, ids = way(layer.router, leaf)
        (weights * torch.linspace(-1, 1, weights.numel()).view_as(weights)).sum().backward()
        assert leaf.grad is not None
        found.append((weights.detach(), ids, leaf.grad))
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize(
    "losses", [["moe.aux_loss_coeff=0"], ["moe.aux_loss_coeff=0.5", "moe.z_loss_coeff=0.1"]]
)
def test_the_lists_are_the_bits_of_the_stock_routing(top_k, losses):
    config = configure(*ALONE, f"moe.top_k={top_k}", *losses)
    (pairs,) = run_ranks(1, routed_both_ways, config)
    assert pairs[0][0].dtype == torch.float32
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)
    assert pairs[2][0].abs().sum() > 0
