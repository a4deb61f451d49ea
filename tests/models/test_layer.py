"""The MoE layer between router and experts."""

import torch

from tests.models.test_gpt import build, configure
from tests.support.ranks import run_ranks


def chosen_and_passed_on(rank: int, config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one layer whose router is very sure: its map, the chosen experts' probabilities, and the
    experts that tokens are sent to."""
    model = build(config)
    layer = model.moe_layers()[0]
    sent = {}

    def experts(tokens, expert_ids, weights):
        sent["ids"], sent["weights"] = expert_ids, weights
        return torch.zeros_like(tokens)

    layer.experts.forward = experts  # type: ignore[method-assign]
    with torch.no_grad():
        layer.router.weight.mul_(1e5)
        hidden = torch.randn(64, 1, config.model.hidden_size)
        _, routing_map = layer.route(hidden)
        layer(hidden)
    return routing_map, sent["ids"], sent["weights"]


def test_tokens_go_to_the_experts_of_the_map():
    """Not to those of the largest probabilities: a chosen one's may have underflowed to 0."""
    config = configure("parallel.expert_parallel=1", "moe.num_experts=8")
    ((routing_map, ids, weights),) = run_ranks(1, chosen_and_passed_on, config)
    assert (weights == 0).sum() > 32, "no probability has underflowed"
    sent = torch.zeros_like(routing_map).scatter(1, ids, True)
    assert torch.equal(sent, routing_map)
