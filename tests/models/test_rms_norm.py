"""RMSNorm on a GPU: the bits of TransformerEngine's own module, and what the formula says."""

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu


def gradients(norm: torch.nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of the input and of the weight."""
    x = x.detach().requires_grad_()
    y = norm(x)
    (weight,) = norm.parameters()
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@pytest.mark.parametrize("shape", [(64, 2, 512), (1, 1, 128), (37, 3, 12, 128)])
def test_same_bits_as_its_own_module_and_near_the_formula(shape):
    te = pytest.importorskip("transformer_engine.pytorch", reason="not installed")
    from models.rms_norm import RMSNorm

    torch.manual_seed(sum(shape))
    hidden = shape[-1]
    ours: torch.nn.Module = RMSNorm(None, hidden, eps=1e-6)  # type: ignore[arg-type]
    ours = ours.bfloat16()
    (weight,) = ours.parameters()
    weight.data.normal_(1, 0.2)
    theirs = te.RMSNorm(hidden, eps=1e-6, params_dtype=torch.bfloat16, device="cuda")
    theirs.weight.data.copy_(weight.data)
    formula = torch.nn.RMSNorm(hidden, eps=1e-6, device="cuda")
    formula.weight.data.copy_(weight.data)
    # As queries and keys come: parts of a wider tensor, not contiguous.
    wide = torch.randn(*shape[:-1], 2 * hidden, device="cuda").bfloat16()
    x, dy = wide[..., :hidden], torch.randn(shape, device="cuda").bfloat16()

    got = gradients(ours, x, dy)
    for a, b in zip(got, gradients(theirs, x, dy), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(got, gradients(formula, x.float(), dy.float()), strict=True):
        assert a.shape == b.shape
        assert (a.float() - b).abs().max() <= 0.01 * b.abs().max() + 0.01
