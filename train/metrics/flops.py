"""How much arithmetic one token costs, counted from the config alone; MFU is in `throughput.py`.

The conventions are those that MFU is usually quoted with (PaLM, arXiv:2204.02311, appendix B;
Megatron-LM, arXiv:2104.04473): a matrix of P parameters costs a token 2·P FLOPs forward, because
a multiply and an add are two; backward costs twice forward, because it forms the gradient of the
input and of the weight; and norms, softmax, rotary positions and the embedding's look-up cost
nothing. Four choices matter when comparing with other people's figures:

- a token counts the `top_k` experts it is routed to, not all of them;
- attention is halved, since the causal mask leaves half of the score matrix to compute
  (Megatron-LM's paper counts it whole);
- the input embedding is left out, because looking up a row is not arithmetic; the output layer is
  counted;
- nothing is recomputed in backward.

The precision of the arithmetic plays no part: a path that computes in FP8 does the same FLOPs.
"""

from dataclasses import dataclass

from models.config import ModelConfig, MoEConfig


@dataclass(frozen=True)
class FlopCount:
    """Size of a model and the cost of a training token."""

    total_params: int
    """Every parameter, each stored once: a tied embedding and output layer are one matrix."""
    active_params: int
    """All but those of the experts that a token is not routed to. So it has the input embedding, as
    the sizes in models' names and on their cards have; the FLOPs do not."""
    flops_per_token: int
    """FLOPs of forward and backward for one token of a full sequence."""


def count(model: ModelConfig, moe: MoEConfig) -> FlopCount:
    """Count parameters and training FLOPs.

        forward = 2 · parameters of a token's matrices + layers · 2 · seq_len · heads · head_dim
        flops_per_token = 3 · forward

    The second term is attention: Q·Kᵀ and P·V are 2 · seq_len · heads · head_dim each for a token
    that sees the whole sequence, and with a causal mask it sees half of it on average. Masking
    documents from each other (`data.document_mask`) does not change the count.
    """
    hidden, head = model.hidden_size, model.head_size
    query = model.num_heads * head

    qkv = hidden * (model.num_heads + 2 * model.num_kv_heads) * head
    attention = qkv + query * hidden
    router = hidden * moe.num_experts
    expert = 3 * hidden * moe.ffn_hidden_size  # SwiGLU: gate, up and down
    shared = 3 * hidden * (moe.shared_ffn_hidden_size or 0)
    norms = 2 * hidden + (2 * head if model.qk_norm else 0)
    vocabulary = model.vocab_size * hidden

    every_token = model.num_layers * (attention + router + shared)
    matrices = every_token + model.num_layers * moe.top_k * expert + vocabulary
    embedding = 0 if model.tie_embeddings else vocabulary  # tied, it is the output layer's matrix
    vectors = model.num_layers * norms + hidden  # and the final norm
    active = matrices + embedding + vectors

    causal_attention = model.num_layers * 2 * model.seq_len * query
    return FlopCount(
        total_params=active + model.num_layers * (moe.num_experts - moe.top_k) * expert,
        active_params=active,
        flops_per_token=3 * (2 * matrices + causal_attention),
    )
