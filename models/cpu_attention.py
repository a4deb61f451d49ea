"""What megatron-core needs replaced to run on a CPU: core attention and rotary positions.

Its own attention allocates scratch memory on a GPU, and its rotary embedding moves itself to one.
On a GPU attention is TransformerEngine's: see `_transformer_engine_parts` in `gpt.py`.
"""

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """Causal softmax(q k^T / sqrt(d)) v, by PyTorch's scaled_dot_product_attention.

    Replaces megatron-core's DotProductAttention in a layer spec. Key-value heads may be fewer than
    query heads (grouped-query attention).
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **unused) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ) -> Tensor:
        """[seq, batch, heads, head_dim] to [seq, batch, heads * head_dim].

        With `packed_seq_params` the inputs are [tokens, heads, head_dim], several documents end to
        end, and a token attends to its own document only: [tokens, heads, head_dim].
        """
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return _attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = (x.transpose(0, 1).split(lengths, 1) for x in (query, key, value))
        outputs = [_attend(q, k, v) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outputs, 1).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class RotaryPositions(RotaryEmbedding):
    """megatron-core's rotary embedding, computed where it is."""

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles float32 [max_seq_len, 1, 1, head_dim]; both halves of a head rotate alike."""
        angles = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
