"""FLOPs and bytes that a micro-batch or a step costs a GPU, counted."""

from models.fp8.tensor import BLOCK
from train.planning.shapes import Shape

FP8 = 1 + 4 / BLOCK
"""Bytes of a value in FP8 with its share of a scale."""
HALF, FULL = 2, 4


def flops(shape: Shape) -> dict[str, float]:
    """FLOPs of a micro-batch, forward and backward, by kind of kernel. Padding is computed too."""
    model, layers, tokens = shape.model, shape.model.num_layers, shape.tokens
    hidden = model.hidden_size
    shared = 3 * hidden * (shape.moe.shared_ffn_hidden_size or 0)
    dense = layers * (2 * hidden * (shape.query + shape.key) + shared) + hidden * model.vocab_size
    one_pass = 2 * shape.computed * 3 * hidden * shape.moe.ffn_hidden_size * layers
    return {
        # Causal: half of the scores. Backward computes five products, forward two.
        "attention": 7 * model.seq_len * shape.query * tokens * layers,
        "dense GEMMs": 6 * dense * tokens,
        # With recomputation the forward pass twice.
        "expert GEMMs": one_pass * (3 if shape.moe.recompute else 2),
        "expert weight gradients": one_pass,
    }


def moved(shape: Shape) -> float:
    """Bytes that the experts' kernels other than GEMMs read and write, of a micro-batch."""
    hidden, ffn, rows = shape.model.hidden_size, shape.moe.ffn_hidden_size, shape.computed
    received, tokens = shape.received * hidden, shape.tokens * hidden
    wide = rows * hidden
    forward: float
    backward: float
    unpermute = (wide + received) * HALF
    if shape.linear == "bf16":
        forward = (received + wide) * HALF + rows * ffn * 3 * HALF + unpermute
        backward = (received + wide) * HALF + rows * ffn * 5 * HALF + unpermute
    elif shape.linear == "direct":
        arrive = tokens * (HALF + FP8) + (received + wide) * FP8
        forward = arrive + rows * ffn * (2 * HALF + FP8) + unpermute
        # SwiGLU's backward: reads da and h; writes dh twice, in FP8 too, and SwiGLU's result.
        swiglu = rows * ffn * (3 * HALF + 2 * HALF + 2 * FP8 + HALF)
        backward = arrive + swiglu + unpermute + 2 * wide * (FP8 + HALF)  # dequantized for wgrad
    else:
        arrive = tokens * (HALF + FP8) + (received + wide) * FP8 + wide * (FP8 + HALF)
        both_ways = HALF + 2 * FP8
        forward = arrive + wide * both_ways + rows * ffn * (3 * HALF + both_ways) + unpermute
        backward = arrive + wide * both_ways + rows * ffn * (5 * HALF + 2 * both_ways) + unpermute
    again = forward - unpermute if shape.moe.recompute else 0
    return shape.model.num_layers * (forward + backward + again)


def streamed(shape: Shape) -> float:
    """Bytes of one pass over the residual stream in all layers, of a micro-batch."""
    return shape.model.num_layers * shape.tokens * shape.model.hidden_size * HALF


def optimizer_bytes(shape: Shape) -> float:
    """Bytes of AdamW, which reads and writes weight, gradient and both means, and of the norm."""
    read_and_written = 2 * (FULL + shape.first_moment + FULL)  # weight, both means
    return shape.stored * read_and_written + 2 * shape.stored_gradients


def prepared_bytes(shape: Shape) -> float:
    """Bytes of casting or quantizing experts' weights once a step."""
    count = shape.model.num_layers * shape.experts
    if shape.linear == "bf16" and shape.replicas > 1:
        return 0.0  # as they were gathered
    if shape.prepare:  # only written, in the pass that updates them
        return count * HALF
    read = FULL if shape.replicas == 1 else HALF
    if shape.linear != "stock":
        return count * (read + HALF)
    return count * (read + HALF + HALF + HALF)  # a cast, and quantized from that


def gathered_bytes(shape: Shape) -> dict[str, float]:
    """Weights in BF16 that come to a rank from others for a micro-batch, by who shares them."""
    layers = shape.model.num_layers
    again = 2 if shape.reshard else 1
    dense = (layers * shape.dense + shape.root) * HALF * again
    experts = layers * shape.experts * HALF * again
    return {
        "all": dense * (1 - 1 / shape.ranks),
        "replicas": experts * (1 - 1 / shape.replicas),
    }


def reduced_bytes(shape: Shape) -> dict[str, float]:
    """Bytes of gradients that a rank sends to others in a step, by who shares them."""
    layers = shape.model.num_layers
    dense = (layers * shape.dense + shape.root) * shape.gradient
    return {
        "all": dense * (1 - 1 / shape.ranks),
        "replicas": layers * shape.experts * shape.gradient * (1 - 1 / shape.replicas),
    }


def copied_bytes(shape: Shape) -> float:
    """Bytes of FSDP's own copies in a step: casts, what is gathered into place, gradients into
    what they are summed in and one buffer. Also where there is one rank."""
    whole = shape.model.num_layers * shape.dense + shape.root
    if shape.replicas > 1:
        whole += shape.model.num_layers * shape.experts
    gather = (FULL + HALF) / shape.ranks + 2 * HALF
    reduce = HALF + 2 * shape.gradient
    gathers = shape.micro_batches if shape.reshard else 1
    return whole * (gather * gathers + reduce)


def dispatched(shape: Shape) -> dict[str, float]:
    """Bytes that a rank sends to others of its group in a micro-batch, both passes, by where they
    go: `node` or `network`. Tokens and gradients are dispatched in the path's format and combined
    in BF16."""
    hidden = shape.model.hidden_size
    out = HALF if shape.linear == "bf16" else FP8
    trips = 2 * out + 2 * HALF + (out if shape.moe.recompute else 0)
    near = min(shape.expert_ranks, shape.node)
    copies = shape.tokens * shape.sent_share * shape.model.num_layers * hidden * trips
    return {"node": copies * (near - 1), "network": copies * (shape.expert_ranks - near)}


def out_bytes(shape: Shape) -> float:
    """The part of `dispatched` that `moe/dispatched_mib` counts: dispatch without combine, in a
    micro-batch."""
    total = sum(dispatched(shape).values())
    out = HALF if shape.linear == "bf16" else FP8
    ways = 3 if shape.moe.recompute else 2
    trips = ways * out + 2 * HALF
    return total * ways * out / trips
