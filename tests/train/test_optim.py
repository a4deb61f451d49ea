"""Learning rates, weight-decay groups, and clipping inside the optimizer."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tests.support.ranks import run_ranks
from train.config import OptimConfig
from train.optim import build_optimizer, clip_gradients, learning_rate


def rates(steps: int, **keys) -> list[float]:
    config = OptimConfig(lr=1.0, **keys)
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak():
    assert rates(10, warmup_steps=4, schedule="constant")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_ends_at_the_lowest_rate():
    found = rates(101, schedule="cosine", min_lr_ratio=0.1)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.55)
    assert found[100] == pytest.approx(0.1)
    assert found == sorted(found, reverse=True)


def test_wsd_is_flat_and_then_falls_in_a_line():
    found = rates(10, schedule="wsd", decay_fraction=0.4, min_lr_ratio=0.2)
    assert found[:6] == [1.0] * 6
    assert found[6:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_warmup_longer_than_the_run():
    assert max(rates(5, warmup_steps=50)) == 0.1


def test_vectors_do_not_decay():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4))
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5), fused=False)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {model[0].weight: 0.5, model[1].weight: 0.0, model[1].bias: 0.0}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed == [True, False, False]


def norms(rank: int) -> list[float]:
    """Norm of gradients in float32 and bfloat16 together, in float64; and the one that clipping
    returns."""
    mesh = init_device_mesh("cpu", (1,))
    parameters = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in (1.0, 30.0):
            parameter = nn.Parameter(DTensor.from_local(torch.zeros(40, 9), mesh, [Shard(0)]))
            parameter.grad_dtype = dtype
            gradient = (torch.randn(40, 9) * size).to(dtype)
            parameter.grad = DTensor.from_local(gradient, mesh, [Shard(0)])
            parameters.append(parameter)
    every = torch.cat([p.grad.to_local().double().view(-1) for p in parameters])  # type: ignore
    return [float(every.norm()), float(clip_gradients(parameters, 0.0))]


def test_the_norm_is_float32_where_gradients_are_not():
    ((want, got),) = run_ranks(1, norms)
    assert got == pytest.approx(want, rel=1e-5)


def clip_twice(rank: int) -> list[torch.Tensor]:
    """Two steps with gradients that need clipping and one that does not, both ways to clip."""
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(8, 8, bias=False)
        model.weight = nn.Parameter(DTensor.from_local(torch.randn(8, 8), mesh, [Shard(0)]))
        optimizer = build_optimizer(model, OptimConfig(lr=0.1, clip_grad=1.0), fused=fused)
        for size in (3.0, 0.01, 5.0):
            gradient = torch.randn(8, 8) * size
            want = float(gradient.norm())
            model.weight.grad = DTensor.from_local(gradient, mesh, [Shard(0)])
            norm = clip_gradients([model.weight], 1.0, optimizer)
            assert float(norm) == pytest.approx(want, rel=1e-5)
            optimizer.step()
        results.append(model.weight.detach().to_local())  # type: ignore[attr-defined]
    return results


def test_a_fused_optimizer_clips_as_it_reads():
    ((plain, fused),) = run_ranks(1, clip_twice)
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)
