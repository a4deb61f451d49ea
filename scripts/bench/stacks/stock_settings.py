"""Stock megatron-core's own settings, from our config and the rungs that are taken."""

import dataclasses
import importlib.metadata
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.transformer_config import TransformerConfig

from models.moe.dispatch.deep_ep import half_of_the_multiprocessors
from train.config import Config, ConfigError

_SMS = (
    "moe_flex_dispatcher_num_sms"
    if "moe_flex_dispatcher_num_sms" in TransformerConfig.__dataclass_fields__
    else "moe_deepep_num_sms"
)
"""The first from megatron-core 0.19 on."""


def choose_dispatch(expert_parallel: int) -> str:
    """`deepep` where it is installed and the group has more than one rank, otherwise `alltoall`.

    Raises ConfigError where a `deep_ep` is there that megatron-core cannot use: by all-to-all it
    would be held back.
    """
    if expert_parallel == 1:
        return "alltoall"
    if fused_a2a.HAVE_DEEP_EP:
        return "deepep"
    if find_spec("deep_ep") is not None:
        raise ConfigError(
            "a package deep_ep is there, and megatron-core cannot use it "
            f"({_why_no_deep_ep()}); fix it, or remove it to measure stock by all-to-all"
        )
    return "alltoall"


def _why_no_deep_ep() -> str:
    """What megatron-core's own imports raise."""
    try:
        from deep_ep import Buffer  # noqa: F401
        from deep_ep.utils import EventHandle, EventOverlap  # noqa: F401
    except Exception as error:
        return " ".join(str(error).split())[:300]
    return "it loaded too late"


def transformer_arguments(
    config: Config, path: str, flags: tuple[str, ...], dispatch: str
) -> dict[str, Any]:
    """Arguments of megatron-core's TransformerConfig. `path` is `bf16` or `fp8`."""
    model, moe = config.model, config.moe
    arguments: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_size,
        "ffn_hidden_size": moe.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "qk_layernorm": model.qk_norm,
        "attention_backend": AttnBackend[model.attention_backend],
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": model.init_std,
        "embedding_init_method_std": model.embedding_init_std,
        # experts
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_router_pre_softmax": moe.top_k == 1,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_router_load_balancing_type": "aux_loss" if moe.aux_loss_coeff else "none",
        "moe_aux_loss_coeff": moe.aux_loss_coeff,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_router_dtype": "fp32",
        "moe_router_force_load_balancing": moe.force_balance,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "flex" if dispatch == "deepep" else "alltoall",
        "expert_model_parallel_size": config.parallel.expert_parallel,
        # precision
        "bf16": True,
        "params_dtype": torch.bfloat16,
        # fused kernels
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "apply_rope_fusion": True,
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "te",
    }
    if path == "fp8":
        arguments |= {
            "fp8": "e4m3",
            "fp8_recipe": "blockwise",
            "fp8_param": "fp8_param" in flags,
            "moe_router_padding_for_quantization": "router_padding" in flags or "grouped" in flags,
        }
    if "grouped" in flags:
        arguments["use_transformer_engine_op_fuser"] = True
    if graphed := graphed_modules(flags):
        arguments |= {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": graphed}
    if "ep_overlap" in flags:
        arguments["overlap_moe_expert_parallel_comm"] = True
    return arguments


def dispatch_arguments(config: Config) -> dict[str, int]:
    """How many multiprocessors DeepEP may take. As ours: nothing runs concurrently with DeepEP in
    this schedule either."""
    return {_SMS: config.moe.dispatch_sms or half_of_the_multiprocessors()}


def graphed_modules(flags: tuple[str, ...]) -> list[str]:
    """What of a layer is in a CUDA graph."""
    attention = ["attn"] if "attention_graphs" in flags else []
    router = ["moe_router", "moe_preprocess"] if attention or "graphs" in flags else []
    return [*attention, *router]


def check(arguments: dict[str, Any]) -> None:
    """Raises ConfigError for what this megatron-core does not know yet."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(arguments) - known):
        version = importlib.metadata.version("megatron-core")
        raise ConfigError(f"megatron-core {version} has no {', '.join(unknown)}; 0.19.2 has")


def distributed_config(flags: tuple[str, ...]) -> DistributedDataParallelConfig:
    """Of megatron-core's DistributedDataParallel: how gradients and weights are communicated."""
    overlap = "no_overlap" not in flags
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32="bf16_grads" not in flags,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        fp8_param_gather="fp8_param" in flags,
    )


def optimizer_config(config: Config, path: str, flags: tuple[str, ...]) -> OptimizerConfig:
    optim = config.optim
    in_bf16 = "bf16_grads" in flags
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=True,
        params_dtype=torch.bfloat16,
        fp8_recipe="blockwise" if path == "fp8" else None,
        use_distributed_optimizer=True,
        overlap_param_gather="no_overlap" not in flags,
        use_precision_aware_optimizer=in_bf16,
        main_grads_dtype=torch.bfloat16 if in_bf16 else torch.float32,
    )
