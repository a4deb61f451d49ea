"""The bias by which experts are chosen: its rule, and that nothing else uses it."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from models.moe import balance
from tests.models.test_gpt import build, configure
from tests.support.ranks import run_ranks

RATE = 0.25
LOADS = [
    [[5, 1, 2, 0], [3, 3, 2, 0]],  # rank 0, two layers
    [[0, 1, 2, 5], [1, 1, 2, 4]],
]
"""Layer 0 adds up to 5, 2, 4, 5, whose mean is 4; layer 1 to its mean everywhere."""


def updated(rank: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    routers = [
        SimpleNamespace(step_load=torch.zeros(4, dtype=torch.int64), expert_bias=torch.zeros(4))
        for _ in range(2)
    ]
    layers = [SimpleNamespace(router=router) for router in routers]
    for _ in range(steps):
        for router, load in zip(routers, LOADS[rank], strict=True):
            router.step_load += torch.tensor(load)
        balance.update(layers, RATE)  # type: ignore[arg-type]
    return [(router.expert_bias, router.step_load) for router in routers]


def test_a_bias_moves_by_the_sign_of_what_an_expert_lacks():
    for layers in run_ranks(2, updated, 3):
        (first, left), (even, _) = layers
        assert first.tolist() == [-3 * RATE, 3 * RATE, 0, -3 * RATE]
        assert even.tolist() == [0] * 4
        assert left.tolist() == [0] * 4, "the next step begins at zero"


def test_a_mean_that_is_no_whole_number():
    """Three tokens for two experts: neither has the mean."""

    def update(rank: int) -> Tensor:
        router = SimpleNamespace(step_load=torch.tensor([2, 1]), expert_bias=torch.zeros(2))
        balance.update([SimpleNamespace(router=router)], 1.0)  # type: ignore[list-item]
        return router.expert_bias

    assert run_ranks(1, update)[0].tolist() == [-1, 1]


def routed(rank: int, config) -> dict[str, Tensor]:
    router = build(config).moe_layers()[0].router
    assert router.expert_bias.tolist() == [0] * 8
    generator = torch.Generator().manual_seed(1)
    router.expert_bias.normal_(generator=generator)
    logits = torch.randn(64, 2, 8, generator=generator).requires_grad_()
    weights, ids = router.routing(logits)
    weights.square().sum().backward()
    return {"bias": router.expert_bias, "logits": logits, "weights": weights, "ids": ids}


@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_are_chosen_by_the_bias_and_weighed_without_it(top_k):
    keys = ["moe.num_experts=8", f"moe.top_k={top_k}", "moe.aux_loss_coeff=0", "moe.z_loss_coeff=0"]
    config = configure("parallel.expert_parallel=1", "moe.expert_bias=true", *keys)
    (got,) = run_ranks(1, lambda rank: detached(routed(rank, config)))
    logits = got["logits"].view(-1, 8).requires_grad_()
    ids = (logits + got["bias"]).topk(top_k).indices
    assert torch.equal(got["ids"], ids)
    assert not torch.equal(ids, logits.topk(top_k).indices), "the bias changes nothing"
    # Of all experts, since one alone would always weigh 1; or of the chosen.
    every = logits.softmax(-1) if top_k == 1 else logits.gather(1, ids).softmax(-1)
    weights = every.gather(1, ids) if top_k == 1 else every
    torch.testing.assert_close(got["weights"], weights)
    weights.square().sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(got["gradient"].view(-1, 8), logits.grad)


def detached(found: dict[str, Tensor]) -> dict[str, Tensor]:
    gradient = found["logits"].grad
    assert gradient is not None
    return {"gradient": gradient, **{name: value.detach() for name, value in found.items()}}
