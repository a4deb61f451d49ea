"""Our model as a model of Hugging Face's `transformers`: which class fits, and its config.json.

`model.qk_norm=true` makes it a Qwen3MoeForCausalLM, false a MixtralForCausalLM. What their configs
can express and ours cannot is refused by name, never guessed. `weights.py` has the weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig, MoEConfig

FILE = "config.json"


@dataclass(frozen=True)
class Family:
    """A class of `transformers`, and its names for things."""

    model_type: str
    architecture: str
    qk_norm: bool
    experts: tuple[str, ...]
    """The key of the number of experts: the hub's name first, then what transformers 5 writes."""
    ffn: str
    """The key of the width of one expert."""
    block: str
    """A layer's experts and router, in the files of the hub."""
    gate: str
    up: str
    down: str
    norm_eps: float
    """What it takes where config.json says nothing, as of `rope_base`."""
    rope_base: float


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    qk_norm=True,
    experts=("num_experts", "num_local_experts"),
    ffn="moe_intermediate_size",
    block="mlp",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    norm_eps=1e-6,
    rope_base=1e4,
)
MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    qk_norm=False,
    experts=("num_local_experts",),
    ffn="intermediate_size",
    block="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
    norm_eps=1e-5,
    rope_base=1e6,
)
FAMILIES = {family.model_type: family for family in (QWEN3_MOE, MIXTRAL)}

SAME = {
    "model.num_layers": "num_hidden_layers",
    "model.hidden_size": "hidden_size",
    "model.num_heads": "num_attention_heads",
    "model.num_kv_heads": "num_key_value_heads",
    "model.vocab_size": "vocab_size",
    "moe.top_k": "num_experts_per_tok",
}
"""Keys that both have, under other names, and that a config.json cannot do without."""

NO_MATTER = {
    *("architectures", "model_type", "_name_or_path", "transformers_version", "torch_dtype"),
    *("dtype", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range"),
    *("output_router_logits", "max_position_embeddings", "max_window_layers"),
}
"""Keys that no weight and no logit depends on."""


def family_of(model: ModelConfig) -> Family:
    """The class that could hold our model; `why_not` tells whether it does."""
    return QWEN3_MOE if model.qk_norm else MIXTRAL


def why_not(model: ModelConfig, moe: MoEConfig) -> str | None:
    """Which key keeps our model from fitting their class, in one line; None if none does."""
    if moe.shared_ffn_hidden_size is not None:
        return (
            f"moe.shared_ffn_hidden_size={moe.shared_ffn_hidden_size}: neither Qwen3-MoE nor "
            "Mixtral has a shared expert; only --format native can hold this model"
        )
    if moe.expert_bias:
        return (
            "moe.expert_bias=true: the routers of Qwen3-MoE and Mixtral have no bias to choose "
            "experts by; only --format native can hold this model"
        )
    if moe.top_k == 1 and not model.qk_norm:
        return (
            "moe.top_k=1 with model.qk_norm=false: Mixtral weighs the one expert with 1, this "
            "model with its probability, as only Qwen3-MoE does, which has model.qk_norm=true; "
            "only --format native can hold this model"
        )
    return None


def to_theirs(model: ModelConfig, moe: MoEConfig, dtype: str, eod: int | None) -> dict[str, Any]:
    """The config.json of a model for which `why_not` is None; `eod` ends a document.

    It has the keys of the hub's own files, which every version of transformers reads.
    """
    family = family_of(model)
    ours = {"model": model, "moe": moe}
    same = {}
    for key, theirs in SAME.items():
        section, _, name = key.partition(".")
        same[theirs] = getattr(ours[section], name)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        **same,
        "head_dim": model.head_size,
        family.experts[0]: moe.num_experts,
        "intermediate_size": moe.ffn_hidden_size,  # Qwen3's is that of layers without experts
        family.ffn: moe.ffn_hidden_size,
        "max_position_embeddings": model.seq_len,
        "rope_theta": float(model.rope_base),
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "router_aux_loss_coef": moe.aux_loss_coeff,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "sliding_window": None,
        "use_cache": True,
        "bos_token_id": eod,  # in training a document begins after the end of another
        "eos_token_id": eod,
        **({} if family is MIXTRAL else _only_qwen3(moe.top_k)),
    }


def _only_qwen3(top_k: int) -> dict[str, Any]:
    """Keys that Mixtral does not have, with the values that make it the same model."""
    return {
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        # The chosen experts' weights add up to 1, except for one alone, which keeps its
        # probability.
        "norm_topk_prob": top_k > 1,
    }


def from_theirs(config: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The class of a config.json, and what it says as our keys: `model.num_layers` and so on.

    Raises ValueError, in one line, with every key that this model does not have or lacks there.
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise ValueError(
            f"model_type={config.get('model_type')!r} is not a model of this kind; take a "
            f"checkpoint with model_type {' or '.join(FAMILIES)}"
        )
    experts = next((key for key in family.experts if key in config), family.experts[0])
    needed = {**SAME, "moe.num_experts": experts, "moe.ffn_hidden_size": family.ffn}
    if lacking := [key for key in needed.values() if config.get(key) is None]:
        raise ValueError(f"lacks {', '.join(lacking)}; take a whole checkpoint")
    for key in needed.values():
        if type(config[key]) is not int:
            raise ValueError(f"{key}={config[key]!r} is not a number; take a whole checkpoint")
    ours = {key: config[theirs] for key, theirs in needed.items()}
    if foreign := list(_foreign(config, family, set(needed.values()))):
        raise ValueError(
            f"says {', '.join(foreign)}, which this model does not have; take a checkpoint without"
        )
    ours["model.head_dim"] = config.get("head_dim") or (
        config["hidden_size"] // config["num_attention_heads"]
    )
    ours["model.rope_base"] = int(_rope_base(config, family))
    ours["model.norm_eps"] = float(config.get("rms_norm_eps", family.norm_eps))
    ours["model.qk_norm"] = family.qk_norm
    ours["model.tie_embeddings"] = bool(config.get("tie_word_embeddings", False))
    ours["moe.shared_ffn_hidden_size"] = None
    return family, ours


def _rope_base(config: dict[str, Any], family: Family) -> float:
    inside = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, 4
    return inside.get("rope_theta", config.get("rope_theta", family.rope_base))


def _foreign(config: dict[str, Any], family: Family, mapped: set[str]) -> Iterator[str]:
    """Each `key=value` of a config.json that is not what this model does."""
    top_k = config["num_experts_per_tok"]
    fixed = {"hidden_act": "silu", "attention_dropout": 0, "router_jitter_noise": 0}
    known = mapped | NO_MATTER | {"head_dim", "rms_norm_eps", "tie_word_embeddings"}
    known |= {"router_aux_loss_coef", "intermediate_size", "rope_theta"}
    if family is QWEN3_MOE:
        fixed |= _only_qwen3(top_k)
        # Without the key the weights do not add up to 1.
        config = {"norm_topk_prob": False, **config}
        if not config.get("use_sliding_window"):
            known |= {"sliding_window"}
    elif top_k == 1:
        yield "num_experts_per_tok=1 (its one expert is weighed with 1)"
    for key, value in config.items():
        if key in ("rope_parameters", "rope_scaling"):
            yield from _foreign_rope(key, value)
        elif key in fixed:
            if (value or fixed[key]) and value != fixed[key]:
                yield f"{key}={value!r}"
        elif key not in known and value not in (None, False, [], {}):
            yield f"{key}={value!r}"
    if _rope_base(config, family) != int(_rope_base(config, family)):
        yield f"rope_theta={_rope_base(config, family)}"


def _foreign_rope(key: str, value: dict[str, Any] | None) -> Iterator[str]:
    neutral = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
    for name, inside in (value or {}).items():
        if name != "rope_theta" and neutral.get(name) != inside:
            yield f"{key}.{name}={inside!r}"
