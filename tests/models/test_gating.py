"""The router's GEMM against float64."""

import pytest
import torch
from torch import Tensor

from models.moe.gating import Gating
from models.moe.layer import Router
from tests.models.test_gpt import build, configure
from tests.support.ranks import run_ranks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def whole_sums():
    """So few tokens are little work for a GPU, which may split sums and add parts in bfloat16."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    yield
    settings.allow_bf16_reduced_precision_reduction = before


def problem(device: str, tokens: int, experts: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights and the gradient of the logits, whose rows differ in size."""
    x = torch.randn(tokens, hidden, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(experts, hidden, device=device) / 50).bfloat16().requires_grad_()
    size = torch.exp2(torch.randint(-20, 5, (tokens, 1), device=device).float())
    return x, weight, torch.randn(tokens, experts, device=device) * size


def assert_near(got: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """As float32 sums `terms` products, and the halves of the gradient and the result's dtype
    round."""
    rounding = torch.finfo(got.dtype).eps / 2
    bound = magnitude * (terms * 2.0**-24 + 2.0**-17) + exact.abs() * rounding * 1.01
    assert ((got.double() - exact).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("tokens", "experts", "hidden"), [(300, 16, 192), (64, 128, 256), (8, 1, 8)]
)
def test_logits_and_gradients(device: str, tokens: int, experts: int, hidden: int):
    x, weight, grad = problem(device, tokens, experts, hidden)
    logits = Gating.apply(x, weight)
    assert logits.dtype is torch.float32
    dx, dw = torch.autograd.grad(logits, (x, weight), grad)
    assert dx.dtype is dw.dtype is torch.bfloat16
    x, weight, grad = (t.detach().double() for t in (x, weight, grad))
    size = x.abs() @ weight.abs().t()
    assert_near(logits.detach(), x @ weight.t(), size, hidden)
    assert_near(dx, grad @ weight, grad.abs() @ weight.abs(), 2 * experts)
    assert_near(dw, grad.t() @ x, grad.abs().t() @ x.abs(), 2 * tokens)


@pytest.mark.parametrize("device", DEVICES)
def test_what_bfloat16_would_round_away_counts(device: str):
    """The gradient of a softmax sums to zero over the experts: what is left of it is small."""
    x = torch.ones(4, 8, device=device).bfloat16().requires_grad_()
    weight = torch.ones(2, 8, device=device).bfloat16().requires_grad_()
    grad = torch.tensor([1 + 2.0**-12, -1.0], device=device).expand(4, 2)
    (dx,) = torch.autograd.grad(Gating.apply(x, weight), x, grad)
    assert torch.equal(dx, torch.full_like(dx, 2.0**-12))


def gates(rank: int, config) -> tuple[bool, Tensor, Tensor]:
    """Whether a router takes this GEMM for bfloat16, and logits of both ways."""
    router: Router = build(config).moe_layers()[0].router
    x = torch.randn(5, 1, config.model.hidden_size).bfloat16()
    router.weight.data = router.weight.data.bfloat16()
    logits = router.gating(x.requires_grad_())
    assert logits.grad_fn is not None
    taken = type(logits.grad_fn.next_functions[0][0]).__name__ == "GatingBackward"
    high = torch.nn.functional.linear(x.float(), router.weight.float())
    return taken, logits.detach(), high.detach()


def test_the_router_takes_it_where_tokens_and_weights_are_bfloat16():
    keys = ("parallel.expert_parallel=1", "moe.num_experts=8")
    ((taken, logits, high),) = run_ranks(1, gates, configure(*keys))
    assert taken
    assert logits.shape == (5, 1, 8)
    torch.testing.assert_close(logits, high)
