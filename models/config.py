"""The keys that shape the model: sections `model` and `moe` of a config file."""

import sys
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

PathName = Literal["bf16", "fp8_baseline", "fp8_compact", "fp8_direct", "fp8_fused"]

PATH_NAMES: tuple[PathName, ...] = get_args(PathName)
"""All paths, in the order in which they are compared. Their code is in `models/moe/paths`."""

DeepEPName = Literal["deep_ep_v1", "deep_ep_v2"]
DispatchName = Literal["auto", "all_to_all", "deep_ep", DeepEPName]
AttentionBackend = Literal["auto", "flash", "fused"]

FP8_BLOCK = 128
"""Tokens are quantized in blocks of 1 x 128 and weights in blocks of 128 x 128."""


FREE_ON_RESUME = "may change on resume"

T = TypeVar("T")
FreeOnResume = Annotated[T, FREE_ON_RESUME]
"""Marks a key, or a whole section, that may change when a run is resumed: its type is otherwise T.
A change of any other key makes it another run, which is refused."""

SAID_ON_RESUME = "may change on resume, reported at the start"
SaidOnResume = Annotated[T, SAID_ON_RESUME]
"""As FreeOnResume, for a key that affects training: the start of the run reports the change."""


class SameTraining(NamedTuple):
    """Marks a key whose listed values train to the same bits: they may be exchanged on resume."""

    values: tuple[Any, ...]


Capacity = float | Literal["default", "auto"] | None
DROPLESS: tuple[Capacity, ...] = (None, "auto", "default")
"""What `moe.capacity` is where no row is dropped."""


class Section(BaseModel):
    """A section of the config: an unknown key or a wrong type is an error, never a guess."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention."""

    num_layers: PositiveInt
    """Transformer layers; each has an attention block and a Mixture-of-Experts block."""
    hidden_size: PositiveInt
    """Width of the residual stream; a multiple of 128."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt
    """Key-value heads; divides `num_heads`."""
    head_dim: PositiveInt | None = None
    """Width of one head; by default `hidden_size / num_heads`."""
    vocab_size: PositiveInt
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    seq_len: PositiveInt
    """Tokens in a training sequence."""
    rope_base: PositiveInt = 10_000
    """Base of the rotary positions."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, as Qwen3 has it."""
    tie_embeddings: bool = False
    """One matrix for the input embedding and the output layer."""
    dense_fp8: bool = False
    """Attention's projections in blockwise FP8 as well, by TransformerEngine, whatever `moe.path`
    is; on GPUs of compute capability 9.0."""
    attention_backend: SaidOnResume[AttentionBackend] = "auto"
    """The attention that a GPU uses: flash is the package FlashAttention; fused is cuDNN's; auto
    leaves the choice to TransformerEngine. They differ in rounding."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; projections back into the residual stream get
    `init_std / sqrt(2 * num_layers)` (GPT-2)."""
    embedding_init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the initial embedding, by default `init_std`. The first norm divides
    gradients by it, so a small one makes them large in the first layers and the first steps; 1
    calms them (Takase et al., "Spike No More", arXiv:2312.16903)."""
    init_from: str | None = None
    """A folder with a Qwen3-MoE or Mixtral checkpoint in Hugging Face's layout: the run starts from
    its weights. `python -m scripts.import_config FOLDER` writes the other keys. A resumed run reads
    its own checkpoint instead."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.hidden_size % FP8_BLOCK:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of {FP8_BLOCK}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; "
                "set head_dim or another number of heads"
            )
        if self.tie_embeddings and self.embedding_init_std is not None:
            raise ValueError(
                f"embedding_init_std={self.embedding_init_std} with tie_embeddings=true would be "
                "the output layer's too; leave one of them out"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} is odd; rotary positions need pairs")
        return self

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads


class MoEConfig(Section):
    """The Mixture-of-Experts block: a top-k router and SwiGLU experts."""

    path: SaidOnResume[PathName] = "bf16"
    """How tokens get from the router to the experts' first GEMM. This is the one key that an
    experiment changes: bf16, fp8_baseline, fp8_compact, fp8_direct, fp8_fused."""
    dispatch: SaidOnResume[DispatchName] = "auto"
    """What moves tokens between ranks. `auto` uses DeepEP where it is installed and can run, and
    all_to_all (gloo, NCCL) elsewhere; `deep_ep` uses DeepEP or refuses to start. Where both of its
    versions can run, fp8_fused uses v2, which does the permute too; the other paths use v2 on two
    ranks, where it was measured to be faster, and v1 on more. `deep_ep_v1` and `deep_ep_v2` name
    one. The line `runs on` at the start says which it is, and why."""
    capacity: Annotated[Capacity, SameTraining(DROPLESS)] = "default"
    """Rows that a rank's experts have room for. null: for exactly what arrives, which makes the
    host wait once per layer. auto: for what recent steps needed, so that no layer waits; a step
    that needed more is repeated with waiting, so the results are those of null, bit for bit.
    `default` is auto on a GPU where one node shares the experts and nothing else waits, and null
    elsewhere. A number of at least 1: a multiple of the rank's even share; rows beyond it are
    dropped and counted in `moe/dropped_rows`, so the model computes another function. On a CPU, and
    where GEMMs are launched expert by expert, a number is ignored. The line `runs on` at the start
    says what applies."""
    recompute: FreeOnResume[bool] = False
    """Keep no activations of the experts: the backward pass dispatches the tokens again and
    recomputes the forward pass, except for combine. The results are the same bits."""
    dispatch_sms: FreeOnResume[int | None] = Field(default=None, gt=0, multiple_of=2)
    """Multiprocessors of the GPU that DeepEP may use for communication, an even number; by default
    half of them. Nothing else runs meanwhile, so more are faster, but NCCL's kernels need some too,
    or the two wait for each other forever."""
    num_experts: PositiveInt = Field(le=1 << 16)
    """Experts in all; a multiple of `parallel.expert_parallel`."""
    top_k: PositiveInt
    """Experts a token is routed to."""
    ffn_hidden_size: PositiveInt
    """Width of one expert's SwiGLU; a multiple of 128."""
    shared_ffn_hidden_size: PositiveInt | None = None
    """Width of a shared expert that every token goes through; none by default."""
    aux_loss_coeff: float = Field(default=1e-2, ge=0)
    """Weight of the load-balancing loss (Switch Transformer)."""
    expert_bias: bool = False
    """Balance the load with a bias for each expert, which is added to the router's logits where
    experts are chosen and nowhere else (Wang et al., arXiv:2408.15664): after each step it rises
    where an expert got less than the mean of all ranks' tokens, and falls where it got more.
    It replaces the load-balancing loss if `aux_loss_coeff` is 0, and otherwise adds to it."""
    bias_update_rate: SaidOnResume[float] = Field(default=1e-3, ge=0, le=1e6)
    """With `expert_bias`: how much a bias changes in a step, so a short run needs a larger value
    than a long one; 0 leaves the biases unchanged."""
    z_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the router's z loss (ST-MoE)."""
    force_balance: bool = False
    """Route at random and evenly, for benchmarks: the model then learns next to nothing."""

    @field_validator("capacity", mode="before")
    @classmethod
    def _check_capacity(cls, value: Any) -> Any:
        """Checked here, or the error would name every type that the value is not."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value in DROPLESS or (is_number and 1 <= value <= sys.float_info.max):
            return value
        raise ValueError(f"{value!r} is neither default, auto, null nor a number from 1 on")

    @model_validator(mode="after")
    def _check(self) -> "MoEConfig":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        if self.ffn_hidden_size % FP8_BLOCK:
            raise ValueError(
                f"ffn_hidden_size={self.ffn_hidden_size} is not a multiple of {FP8_BLOCK}"
            )
        return self
