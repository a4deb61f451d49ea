"""The experts' forward and backward, dispatch included, against a dense float64 definition."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.config import PathName
from models.fp8 import operations
from models.fp8.operations import Operations
from models.moe.dispatch.all_to_all import AllToAll
from models.moe.experts import ExpertMLP, prepare_weights
from models.moe.paths import PATHS
from models.moe.runtime import Runtime, build_linear
from tests.support.paths import EXPECTED
from tests.support.ranks import run_ranks

EXPERTS, TOP_K, HIDDEN, FFN = 4, 2, 256, 128

# Why EXPECTED allows what it does. E4M3 has 3 bits of mantissa: a
# quantized value is off by up to 2^-4, by 2.6% on average, and a product of two by 3.7%. A sum of
# such terms is off by the same share of itself, and two GEMMs lie in a row, so 6% to 7% are usual
# here; a single token has fewer terms to average over. float32 itself is off by about 1e-6.
RESULTS = ["out", "tokens", "weights", "up", "down"]

Routing = Callable[[int, torch.Generator], Tensor]


def anywhere(tokens: int, generator: torch.Generator) -> Tensor:
    return torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]


def all_to_one(tokens: int, generator: torch.Generator) -> Tensor:
    """Expert 1 gets every token, its neighbours one each, the last nothing."""
    ids = torch.tensor([[1, 0]]).repeat(tokens, 1)
    ids[::2, 1] = 2
    return ids


def problem(rank: int, tokens: int, route: Routing, seed: int):
    """One rank's tokens and gradient; the experts' weights are the same for all ranks."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(EXPERTS, 2 * FFN, HIDDEN, generator=generator) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, FFN, generator=generator) * FFN**-0.5
    generator.manual_seed(100 + 10 * seed + rank)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = route(tokens, generator)
    weights = torch.rand(tokens, TOP_K, generator=generator)
    # Gradients of tokens differ in size by orders of magnitude, which is what hurts FP8.
    grad = torch.randn(tokens, HIDDEN, generator=generator)
    grad *= torch.exp2(-6 * torch.rand(tokens, 1, generator=generator))
    return x, ids, weights, up, down, grad


def definition(x, ids, weights, up, down, grad) -> dict[str, Tensor]:
    """Every expert on every token, in float64, with autograd's gradients."""
    x, weights, up, down = (t.double().requires_grad_() for t in (x, weights, up, down))
    h = torch.einsum("th,enh->ten", x, up)
    gate, linear = h.chunk(2, -1)
    y = torch.einsum("tef,ehf->teh", F.silu(gate) * linear, down)
    share = torch.zeros(len(x), EXPERTS, dtype=torch.float64).scatter(1, ids, weights)
    out = (y * share.unsqueeze(-1)).sum(1)
    gradients = torch.autograd.grad(out, (x, weights, up, down), grad.double())
    return dict(zip(RESULTS, (out.detach(), *gradients), strict=True))


def weights_scale(x, ids, weights, up, down, grad) -> Tensor:
    """|gradient| |expert's output| of each token and choice. The gradient of a routing weight is
    the product of the two vectors; it may cancel to nothing, and its error is a share of this."""
    gate, linear = torch.einsum("th,enh->ten", x, up).chunk(2, -1)
    y = torch.einsum("tef,ehf->teh", F.silu(gate) * linear, down)
    return y.norm(dim=-1).gather(1, ids) * grad.norm(dim=-1, keepdim=True)


def run_path(
    rank: int, path: PathName, tokens: list[int], route: Routing, seed: int, step: int = 1
) -> dict:
    ranks = dist.get_world_size()
    x, ids, weights, up, down, grad = problem(rank, tokens[rank], route, seed)
    local = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    leaves = [t.clone().requires_grad_() for t in (x, weights, up[local], down[local])]
    dispatcher = AllToAll(dist.distributed_c10d._get_default_group(), EXPERTS)
    ops, _ = operations.choose(path, "cpu")
    if step > 1:
        ops = cast(Operations, SimpleNamespace(**{**vars(ops), "rows_step": lambda: step}))
    runtime = Runtime(PATHS[path], ops, build_linear(PATHS[path], ops, "cpu"), dispatcher)
    prepared = prepare_weights(leaves[2], leaves[3], x.dtype, runtime)
    out = ExpertMLP.apply(*leaves, ids, 0, runtime, prepared)
    out.backward(grad)
    return dict(zip(RESULTS, (out.detach(), *(t.grad for t in leaves)), strict=True))


def gather(
    path: str, tokens: list[int], route: Routing, seed: int, step: int = 1
) -> dict[str, Tensor]:
    results = run_ranks(len(tokens), run_path, path, tokens, route, seed, step)
    return {key: torch.cat([r[key] for r in results]) for key in results[0]}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


def whole(tokens: list[int], route: Routing, seed: int) -> list[Tensor]:
    """The problem of all ranks as one."""
    parts = [problem(rank, n, route, seed) for rank, n in enumerate(tokens)]
    x, ids, weights, grad = (torch.cat([p[i] for p in parts]) for i in (0, 1, 2, 5))
    return [x, ids, weights, parts[0][3], parts[0][4], grad]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("tokens", "route"),
    [
        ([200], anywhere),
        ([150, 37], anywhere),
        ([40, 50, 1, 30], anywhere),
        ([150, 37], all_to_one),
        ([0, 90], anywhere),
        ([1, 0], anywhere),  # one token in all: most experts get nothing
    ],
)
def test_paths_compute_the_definition(path, tokens, route):
    seed = int(torch.randint(10_000, ()))  # fresh data each time; pytest prints it on failure
    inputs = whole(tokens, route, seed)
    got, want = gather(path, tokens, route, seed), definition(*inputs)
    sizes = {**want, "weights": weights_scale(*inputs)}
    for name in RESULTS:
        error = float((got[name] - want[name]).norm() / sizes[name].norm())
        assert error < EXPECTED[path].bound, f"{name} is off by {error:.2e}, seed {seed}"


@pytest.mark.parametrize("tokens", [[150, 37], [1, 0]])
def test_baseline_and_compact_are_bitwise_equal(tokens):
    seed = int(torch.randint(10_000, ()))
    baseline = gather("fp8_baseline", tokens, anywhere, seed)
    compact = gather("fp8_compact", tokens, anywhere, seed)
    for name, value in baseline.items():
        assert torch.equal(value, compact[name]), f"{name}, seed {seed}"


@pytest.mark.parametrize(
    ("tokens", "route"),
    [([130], anywhere), ([150, 37], all_to_one), ([40, 50, 1, 30], anywhere), ([1, 0], anywhere)],
)
def test_direct_and_fused_are_bitwise_equal(tokens, route):
    """Where the dispatcher does not expand; `test_deep_ep_v2.py` has one that does."""
    seed = int(torch.randint(10_000, ()))
    direct = gather("fp8_direct", tokens, route, seed)
    fused = gather("fp8_fused", tokens, route, seed)
    for name, value in direct.items():
        assert torch.equal(value, fused[name]), f"{name}, seed {seed}"


@pytest.mark.parametrize("path", ["fp8_direct", "fp8_fused"])
@pytest.mark.parametrize(("tokens", "route"), [([150, 37], all_to_one), ([0, 90], anywhere)])
def test_rows_in_steps_compute_the_same_bits(path, tokens, route):
    """As DeepGEMM wants them; output and all gradients."""
    seed = int(torch.randint(10_000, ()))
    want = gather(path, tokens, route, seed)
    for step in (384, 10_000):
        for name, value in gather(path, tokens, route, seed, step).items():
            assert torch.equal(value, want[name]), f"{name}, seed {seed}"


def test_direct_is_closer_than_baseline():
    """Closer in every tensor that the two compute differently: the weights' gradients.

    The measure is the relative Frobenius distance to the unquantized result. What does not pass
    through wgrad sees the same FP8 operands in both paths.
    """
    for seed in range(4):
        want = gather("bf16", [150, 200], anywhere, seed)
        baseline = gather("fp8_baseline", [150, 200], anywhere, seed)
        direct = gather("fp8_direct", [150, 200], anywhere, seed)
        for name in ("up", "down"):
            far, near = distance(baseline[name], want[name]), distance(direct[name], want[name])
            assert near < 0.95 * far, f"{name}, seed {seed}: {near:.5f} against {far:.5f}"
        for name in ("out", "tokens", "weights"):
            far, near = distance(baseline[name], want[name]), distance(direct[name], want[name])
            assert near == pytest.approx(far, rel=0.01), f"{name}, seed {seed}"
