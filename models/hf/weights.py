"""Which tensor of a Hugging Face checkpoint is which part of our weights.

One table serves both directions: a part of ours is copied out, or into. Theirs has separate
queries, keys and values, ours has one matrix. Theirs has a matrix for each expert's gate, up- and
down-projection (the files of the hub), or all experts in one tensor (transformers 5); ours is the
latter.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from models.config import ModelConfig, MoEConfig
from models.hf.config import Family

INDEX = "model.safetensors.index.json"
"""Says which file holds which tensor."""


class Piece(NamedTuple):
    """A tensor of theirs, and the part of ours that has the same numbers."""

    theirs: str
    shape: tuple[int, ...]
    """Shape of theirs."""
    ours: str
    expert: int | None = None
    """The expert, where theirs has a tensor for each."""
    rows: tuple[int, int, int] | None = None
    """Where theirs has only some rows of ours: those from the second to the third of all parts,
    in each of this many groups of parts."""
    parts: int = 1
    """Equal parts of rows that such a group has."""

    @property
    def of_experts(self) -> bool:
        """Whether ours has a first dimension of experts, of which a rank holds a share."""
        return ".experts." in self.ours

    def part(self, weight: Tensor) -> Tensor:
        """The part of `weight` as a view; reshaped to `shape` it is theirs.

        `weight` is ours, or of one expert where `expert` is one.
        """
        if self.rows is None:
            return weight
        groups, begin, end = self.rows
        return weight.view(groups, self.parts, -1, weight.shape[-1])[:, begin:end]


def pieces(model: ModelConfig, moe: MoEConfig, family: Family, packed: bool) -> Iterator[Piece]:
    """All tensors of a checkpoint, in the layout of transformers 5 (`packed`) or in the hub's."""
    hidden, vocab = model.hidden_size, model.vocab_size
    yield Piece("model.embed_tokens.weight", (vocab, hidden), "embedding.word_embeddings.weight")
    for number in range(model.num_layers):
        theirs, ours = f"model.layers.{number}.", f"decoder.layers.{number}."
        yield Piece(f"{theirs}input_layernorm.weight", (hidden,), f"{ours}input_layernorm.weight")
        yield from _attention(model, f"{theirs}self_attn.", f"{ours}self_attention.")
        yield Piece(
            f"{theirs}post_attention_layernorm.weight", (hidden,), f"{ours}pre_mlp_layernorm.weight"
        )
        block = f"{theirs}mlp." if packed else f"{theirs}{family.block}."
        yield Piece(f"{block}gate.weight", (moe.num_experts, hidden), f"{ours}mlp.router.weight")
        yield from _experts(hidden, moe, family, packed, f"{block}experts.", f"{ours}mlp.experts.")
    yield Piece("model.norm.weight", (hidden,), "decoder.final_layernorm.weight")
    if not model.tie_embeddings:
        yield Piece("lm_head.weight", (vocab, hidden), "output_layer.weight")


def _attention(model: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    hidden, head, groups = model.hidden_size, model.head_size, model.num_kv_heads
    queries = model.num_heads // groups
    # Rows of ours, a key-value head after the other: its queries' heads, its key, its value.
    parts = (("q_proj", 0, queries), ("k_proj", queries, queries + 1))
    for name, begin, end in (*parts, ("v_proj", queries + 1, queries + 2)):
        shape = (groups * (end - begin) * head, hidden)
        rows = (groups, begin, end)
        yield Piece(
            *(f"{theirs}{name}.weight", shape, f"{ours}linear_qkv.weight"),
            rows=rows,
            parts=queries + 2,
        )
    shape = (hidden, model.num_heads * head)
    yield Piece(f"{theirs}o_proj.weight", shape, f"{ours}linear_proj.weight")
    if model.qk_norm:
        yield Piece(f"{theirs}q_norm.weight", (head,), f"{ours}q_layernorm.weight")
        yield Piece(f"{theirs}k_norm.weight", (head,), f"{ours}k_layernorm.weight")


def _experts(
    hidden: int, moe: MoEConfig, family: Family, packed: bool, theirs: str, ours: str
) -> Iterator[Piece]:
    experts, ffn = moe.num_experts, moe.ffn_hidden_size
    if packed:
        yield Piece(f"{theirs}gate_up_proj", (experts, 2 * ffn, hidden), f"{ours}up")
        yield Piece(f"{theirs}down_proj", (experts, hidden, ffn), f"{ours}down")
        return
    for expert in range(experts):
        its = f"{theirs}{expert}."
        for name, begin in ((family.gate, 0), (family.up, 1)):
            yield Piece(
                *(f"{its}{name}.weight", (ffn, hidden), f"{ours}up", expert),
                rows=(1, begin, begin + 1),
                parts=2,
            )
        yield Piece(f"{its}{family.down}.weight", (hidden, ffn), f"{ours}down", expert)
