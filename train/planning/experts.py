"""What the experts of a layer hold while they compute, path by path, as the code frees it.

The names are those of `models/moe/experts.py` and `models/fp8/linear.py`: dy and dx are gradients
of the experts' output and input rows, da and dh those of SwiGLU's result and of what it reads.
"""

from dataclasses import dataclass

from models.fp8.tensor import BLOCK
from train.planning.shapes import Shape

SCALE = 4 / BLOCK
"""Bytes of scales for each byte in FP8."""


@dataclass(frozen=True)
class Rows:
    """Bytes of the experts' rows [P, n], of what is received [R, n], and of tokens [T, n]."""

    shape: Shape
    value: int = 2
    """Bytes of a value that is not in FP8."""

    def high(self, width: int) -> int:
        return self.shape.rows * width * self.value

    def fp8(self, width: int) -> int:
        return int(self.shape.rows * width * (1 + SCALE))

    @property
    def received(self) -> int:
        return self.shape.received * self.shape.model.hidden_size * self.value

    @property
    def tokens(self) -> int:
        return self.shape.tokens * self.shape.model.hidden_size * self.value


def kept_bytes(shape: Shape, value: int = 2) -> int:
    """What `Saved` keeps: h, x and a; or, with `moe.recompute`, the tokens' experts and weights
    (the tokens are the router's input and counted there)."""
    if shape.moe.recompute:
        return shape.tokens * shape.moe.top_k * (8 + 4)
    return saved_bytes(shape, value)


def saved_bytes(shape: Shape, value: int = 2) -> int:
    """The size of `Saved`, whether it is kept or recomputed."""
    rows, hidden, ffn = Rows(shape, value), shape.model.hidden_size, shape.moe.ffn_hidden_size
    h = rows.high(2 * ffn)
    if shape.linear == "bf16":
        return h + rows.high(hidden) + rows.high(ffn)
    if shape.linear == "direct":
        return h + rows.fp8(hidden)
    return h + rows.fp8(hidden) + rows.fp8(ffn)


def forward_bytes(shape: Shape) -> int:
    """The most at once in a forward pass, beyond what it keeps."""
    rows, hidden, ffn = Rows(shape), shape.model.hidden_size, shape.moe.ffn_hidden_size
    y = rows.high(hidden)
    combine = y + rows.received + rows.tokens
    unkept = saved_bytes(shape) - kept_bytes(shape)
    if shape.linear == "bf16":
        return unkept + combine
    # GEMMs read FP8 along rows, which the stock way quantizes from BF16.
    stock = shape.linear == "stock"
    up = rows.fp8(hidden) + (rows.high(hidden) if stock else 0)
    down = rows.fp8(ffn) + (rows.high(ffn) if stock else 0) + y
    return unkept + max(combine, up, down)


def backward_bytes(shape: Shape, gradient: int) -> int:
    """The most at once in a backward pass beyond `Saved`; weight gradients of the layer included,
    `gradient` bytes each."""
    rows, hidden, ffn = Rows(shape), shape.model.hidden_size, shape.moe.ffn_hidden_size
    da, dx = rows.high(ffn), rows.high(hidden)
    weights = shape.experts * gradient
    if shape.linear == "bf16":
        held = rows.high(hidden) + da + rows.high(2 * ffn) + dx
        moments = [held + rows.received + rows.tokens, held + rows.tokens + weights]
    elif shape.linear == "direct":
        # dh and SwiGLU's result in high precision, for wgrad, which dequantizes the others.
        held = rows.fp8(hidden) + da + rows.high(2 * ffn) + rows.high(ffn) + dx
        dgrad = held + rows.fp8(2 * ffn)
        wgrad = held + rows.tokens + rows.high(hidden) + weights
        moments = [dgrad, held + rows.received + rows.tokens, wgrad]
    else:
        # Each operand in FP8 along rows and along columns, beside what it was quantized from.
        first = rows.high(hidden) + 2 * rows.fp8(hidden) + da
        dgrad = rows.fp8(hidden) + da + rows.high(2 * ffn) + 2 * rows.fp8(2 * ffn) + dx
        held = rows.fp8(hidden) + da + rows.fp8(2 * ffn) + dx
        moments = [first, dgrad, held + rows.received + rows.tokens, held + rows.tokens + weights]
    again = saved_bytes(shape) + rows.high(hidden) if shape.moe.recompute else 0
    return max(moments) + again
