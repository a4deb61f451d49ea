"""The optimizer's kernels: within rounding of float64, and quantized as by the quantize kernels."""

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from models.fp8 import kernels, reference
from models.fp8.reference.adamw import AdamWStep, adamw
from tests.models.test_kernels_numbers import DEVICES, assert_same_bits, generator, set_up

pytestmark = pytest.mark.parametrize("device", DEVICES)

UNIT = 2.0**-24

NARROW = list(itertools.product((torch.float32, torch.bfloat16), repeat=2))
"""Dtypes of the gradient and the first moment."""

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def prepared(monkeypatch, request):
    set_up(monkeypatch, request.node.callspec.params["device"])


def tensors(device: str, *shape: int) -> Four:
    """w, gradient and moments as in the middle of a run; sizes differ by magnitudes."""
    gen = generator()

    def some() -> Tensor:
        size = torch.exp2(-12 * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=gen))
        return torch.randn(*shape, generator=gen) * size

    return (
        some().to(device),
        some().to(device),
        (some() * 0.1).to(device),
        some().square().to(device),
    )


def narrowed(before: Four, grad: torch.dtype, mean: torch.dtype) -> Four:
    return before[0], before[1].to(grad), before[2].to(mean), before[3]


def copies(before: Four) -> Four:
    w, grad, mean, square = (t.clone() for t in before)
    return w, grad, mean, square


def a_step(device: str, scaled: bool) -> AdamWStep:
    scale = torch.tensor(3.7, device=device) if scaled else None
    return AdamWStep(2e-3, 0.9, 0.95, 1e-8, 0.1, 5, scale)


def check(before: Four, after: Four, step: AdamWStep) -> None:
    """`after` against float64. Of n roundings of a value each is off by UNIT of it at most."""
    kept = 2.0**-8 if before[2].dtype is torch.bfloat16 else 0.0
    w, grad, mean, square = (t.double() for t in before)
    exact = [w.clone(), mean.clone(), square.clone()]
    scale = step.grad_scale.double() if step.grad_scale is not None else None
    wide = AdamWStep(
        *(step.lr, step.beta1, step.beta2, step.eps, step.weight_decay, step.number), scale
    )
    adamw(exact[0], grad, exact[1], exact[2], wide)
    if scale is not None:
        grad = grad / scale
    off_mean = 6 * UNIT * (mean.abs() + grad.abs())
    factor = step.rate / (exact[2].sqrt() / step.deviation + step.eps)
    off_w = 4 * UNIT * w.abs() + factor * (off_mean + 12 * UNIT * exact[1].abs())
    # What is kept of the mean may be rounded further.
    bounds = [off_w, off_mean + kept * (exact[1].abs() + off_mean), 8 * UNIT * exact[2]]
    for got, want, bound in zip([after[0], *after[2:]], exact, bounds, strict=True):
        assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2049,), (3, 700), (0, 5)])
@pytest.mark.parametrize(("grad", "mean"), NARROW)
def test_adamw(device, shape, scaled, grad, mean):
    before, step = narrowed(tensors(device, *shape), grad, mean), a_step(device, scaled)
    after = copies(before)
    kernels.adamw(*after, step)
    check(before, after, step)
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adamw_cast(device, dtype):
    before, step = tensors(device, 3, 70, 33), a_step(device, True)
    after = copies(before)
    cast = kernels.adamw_cast(*after, step, dtype)
    check(before, after, step)
    assert_same_bits(cast, after[0].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 128, 256), (3, 384, 128), (0, 128, 128)])
@pytest.mark.parametrize(("grad", "mean"), NARROW[::3])
def test_adamw_quantize(device, shape, dtype, grad, mean):
    before, step = narrowed(tensors(device, *shape), grad, mean), a_step(device, True)
    after = copies(before)
    both = kernels.adamw_quantize(*after, step, dtype)
    check(before, after, step)
    for got, want in zip(both, reference.quantize_weights_both_ways(after[0], dtype), strict=True):
        assert_same_bits(got, want)


def test_bad_operands_are_one_line(device):
    w, grad, mean, square = tensors(device, 1, 128, 128)
    step = a_step(device, False)
    with pytest.raises(ValueError, match="grad must be contiguous float32 of shape"):
        kernels.adamw(w, grad.half(), mean, square, step)
    with pytest.raises(ValueError, match="square must be contiguous float32 of shape"):
        kernels.adamw(w, grad, mean, square.bfloat16(), step)
    with pytest.raises(ValueError, match="mean must be contiguous"):
        kernels.adamw(w, grad, mean.transpose(1, 2), square, step)
    small = tensors(device, 1, 64, 128)
    with pytest.raises(ValueError, match="N must be a multiple of 128"):
        kernels.adamw_quantize(*small, step, torch.bfloat16)
