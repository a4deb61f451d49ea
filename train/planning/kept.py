"""Activations that a transformer layer keeps for its backward pass, tensor by tensor.

It is what autograd saves for backward, each storage once, whichever function saved it first. The
list is a GPU's. On a CPU norms, rotation and router keep more, which tests/train/test_planning.py
names tensor by tensor, and the rest is checked there to the byte.
"""

from train.planning.experts import kept_bytes
from train.planning.shapes import Shape

HALF, FULL, INDEX = 2, 4, 8
"""Bytes of bfloat16, of float32, of int64."""


def of_layer(shape: Shape, value: int = HALF) -> dict[str, int]:
    """Bytes by tensor, of a micro-batch; `value` bytes a value, in the experts too."""
    model, tokens = shape.model, shape.tokens
    hidden = tokens * model.hidden_size * value
    query, key = tokens * shape.query * value, tokens * shape.key * value
    found = {
        "input": hidden,  # of the first norm, and of the residual
        "input of QKV": hidden,
        "queries": query,  # after the rotation, as attention takes them
        "keys": key,
        "values": key,
        "output of attention": query,  # and input of its projection
        "sums of attention": tokens * model.num_heads * FULL,
        "middle": hidden,  # of the second norm, and of the residual
        "input of the MoE block": hidden,  # of the router, of shared experts, and dispatched
        "divisors of norms": 2 * tokens * FULL,
    }
    if model.qk_norm:
        heads = model.num_heads + model.num_kv_heads
        found |= {"queries before their norm": query, "keys before their norm": key}
        found["divisors of norms"] += tokens * heads * FULL
    return found | _router(shape) | _shared(shape, value) | {"experts": kept_bytes(shape, value)}


def _router(shape: Shape) -> dict[str, int]:
    """Which experts were chosen, and their weights; scores of all experts where a loss is made of
    them, or the choice."""
    tokens, moe = shape.tokens, shape.moe
    scores = tokens * moe.num_experts * FULL
    found = {"router": tokens * moe.top_k * (INDEX + FULL)}
    if moe.top_k == 1:  # the softmax comes before the choice
        found["scores"] = scores
    if moe.aux_loss_coeff:
        found["auxiliary loss"] = scores
    if moe.z_loss_coeff:
        found["z loss"] = scores
    return found


def _shared(shape: Shape, value: int) -> dict[str, int]:
    """What a shared expert keeps: what its SwiGLU reads and writes."""
    ffn = shape.moe.shared_ffn_hidden_size
    return {"shared expert": shape.tokens * 3 * ffn * value} if ffn else {}
