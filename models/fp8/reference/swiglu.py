"""The experts' activation, weighted by the router: alone, and with its result quantized at once.

Infinities in what these functions write are noted; see models/fp8/overflow.py.

`offsets` int64 `[E + 1]`, where given, says where experts' rows are: rows from `offsets[E]` on are
unused, and what these functions return there is undefined (here zeros, whatever they get there).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fp8.overflow import look
from models.fp8.reference.quantize import quantize
from models.fp8.tensor import BlockScaledTensor, Layout


def swiglu(h: Tensor, probs: Tensor, offsets: Tensor | None = None) -> Tensor:
    """`silu(h[:, :F]) * h[:, F:] * probs`: `h [P, 2F]`, `probs [P]` float32 to `[P, F]`.

    Computed in float32 and rounded once, to h's dtype. The routing weight is applied here rather
    than after the down-projection, as that is linear and this saves a pass over its result.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    h, probs = _used(h, offsets), _used(probs, offsets)
    gate, up = h.float().chunk(2, dim=1)
    return look((F.silu(gate) * up * probs[:, None]).to(h.dtype))


def swiglu_backward(
    da: Tensor, h: Tensor, probs: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu`: `da [P, F]` to `dh [P, 2F]` in h's dtype and `dprobs [P]` in float32.

    With s = sigmoid(gate), the derivative of silu is s * (1 + gate * (1 - s)). Computed in
    float32 from h and probs alone, so swiglu's result need not be kept.
    """
    da, h, probs = _used(da, offsets), _used(h, offsets), _used(probs, offsets)
    gate, up = h.float().chunk(2, dim=1)
    da = da.float()
    s = torch.sigmoid(gate)
    silu = gate * s
    dprobs = (da * silu * up).sum(1)
    da = da * probs[:, None]
    dgate = da * up * (s * (1 + gate * (1 - s)))
    return look(torch.cat([dgate, da * silu], dim=1).to(h.dtype)), dprobs


def swiglu_quantize(
    h: Tensor, probs: Tensor, layout: Layout, offsets: Tensor | None = None
) -> BlockScaledTensor:
    """`quantize(swiglu(h, probs), layout)`: `h [P, 2F]`, `probs [P]` float32 to `[P, F]`."""
    return quantize(swiglu(h, probs, offsets), layout)


def swiglu_backward_quantize(
    da: Tensor, h: Tensor, probs: Tensor, layout: Layout, offsets: Tensor | None = None
) -> tuple[Tensor, BlockScaledTensor, Tensor, Tensor]:
    """`swiglu_backward`, and what an FP8 backward pass needs next.

    Returns `dh [P, 2F]` in h's dtype, the same quantized, `dprobs [P]`, and `a [P, F]`, which is
    swiglu's result once more.
    """
    dh, dprobs = swiglu_backward(da, h, probs, offsets)
    return dh, quantize(dh, layout), dprobs, swiglu(h, probs, offsets)


def _used(x: Tensor, offsets: Tensor | None) -> Tensor:
    """x with zeros in the rows after the last expert's; x itself where there are none."""
    if offsets is None or (end := int(offsets[-1])) >= len(x):
        return x
    x = x.clone()
    x[end:] = 0
    return x
