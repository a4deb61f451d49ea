"""The model: megatron-core's GPTModel with our MoE layer in it, from a config.

    model = build_gpt(config.model, config.moe, device, seed)
    losses = model(tokens, labels)

Needs torch.distributed and megatron-core's parallel_state, with the expert-parallel size set; see
train/parallel.py. The parameters have the same names on every machine.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.config import ModelConfig, MoEConfig
from models.cpu_attention import CausalAttention, RotaryPositions
from models.documents import Documents
from models.initial_weights import InitialWeights
from models.moe.experts import Experts
from models.moe.layer import ExpertParallelMoE
from models.moe.runtime import GPTConfig, Runtime, build_runtime


# megatron-core 0.19 calls GPTModel deprecated, and HybridModel what to take. 0.16 has none, and its
# stack counts attention and experts as two layers: other parameter names, so other checkpoints, and
# other units for FSDP, for the same arithmetic.
class GPT(GPTModel):
    """megatron-core's GPTModel with the arguments that training needs."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, labels: Tensor | None, documents: Documents | None = None
    ) -> Tensor:
        """Cross-entropy of each token, float32 [batch, seq].

        tokens, labels: int64 [batch, seq]. Given `documents`, a token attends within its own only.
        Without labels: logits [batch, seq, vocab].
        """
        if documents is None:
            return super().forward(tokens, None, None, labels=labels)
        shape = tokens.shape
        bounds, longest = documents
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        tokens = tokens.reshape(1, -1)
        labels = labels if labels is None else labels.reshape(1, -1)
        out = super().forward(tokens, None, None, labels=labels, packed_seq_params=packed)
        # A copy, since FSDP warns of a view: writing to one would lose its hook for backward.
        return out.view(*shape, *out.shape[2:]).clone()

    def moe_layers(self) -> list[ExpertParallelMoE]:
        return [layer.mlp for layer in self.decoder.layers]

    def forget_prepared_weights(self) -> None:
        """Call it after a change of the parameters: experts quantize theirs once per change."""
        for layer in self.moe_layers():
            layer.experts.forget_prepared()

    def local_expert_weights(self) -> list[Tensor]:
        """This rank's part of the experts' master weights, float32."""
        weights = (p for layer in self.moe_layers() for p in layer.experts.parameters())
        return [w.to_local() if isinstance(w, DTensor) else w for w in weights]

    @property
    def runtime(self) -> Runtime:
        """Which library runs what of the path, in all layers."""
        return self.config.moe_runtime


def build_gpt(
    model: ModelConfig,
    moe: MoEConfig,
    device: torch.device,
    seed: int,
    deterministic: bool = False,
) -> GPT:
    """A GPT with float32 weights on `device`, which depend on the seed and not on the number of
    ranks."""
    on_gpu = device.type == "cuda"
    runtime = build_runtime(model, moe, device.type)
    parts = _transformer_engine_parts() if on_gpu else _torch_parts()
    config = GPTConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=moe.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        attention_backend=AttnBackend[model.attention_backend],
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        # With one expert a token, a softmax over the chosen is always 1 and teaches nothing.
        moe_router_pre_softmax=moe.top_k == 1,
        moe_ffn_hidden_size=moe.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size,
        moe_router_load_balancing_type="aux_loss" if moe.aux_loss_coeff else "none",
        moe_aux_loss_coeff=moe.aux_loss_coeff,
        moe_z_loss_coeff=moe.z_loss_coeff or None,
        moe_router_dtype="fp32",
        # TransformerEngine's kernel sums the value of the auxiliary loss in the order in which its
        # threads finish; the value is only logged.
        moe_router_fusion=on_gpu and not deterministic,
        moe_router_force_load_balancing=moe.force_balance,
        # The one whose constructor needs no GPU; the layer replaces it by our own.
        moe_token_dispatcher_type="allgather",
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        params_dtype=torch.float32,
        deterministic_mode=deterministic,
        # Weights are drawn below, by name, independent of the order of construction.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=on_gpu,
        apply_rope_fusion=on_gpu,
        cross_entropy_loss_fusion=on_gpu,
        cross_entropy_fusion_impl="te" if on_gpu else "native",
        fp8="e4m3" if model.dense_fp8 else None,
        fp8_recipe="blockwise",
        # Otherwise TransformerEngine keeps weights quantized until it is told of the next step.
        disable_parameter_transpose_cache=True,
        moe_runtime=runtime,
        expert_bias=moe.expert_bias,
        shared_expert_linears=MLPSubmodules(
            linear_fc1=parts.column_linear, linear_fc2=parts.row_linear
        ),
    )
    gpt = GPT(
        config,
        _block_spec(config, parts),
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_len,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        share_embeddings_and_output_weights=model.tie_embeddings,
    )
    if not on_gpu:
        gpt.rotary_pos_emb = RotaryPositions(
            model.head_size, 1.0, rotary_base=model.rope_base, use_cpu_initialization=True
        )
    for number, layer in enumerate(gpt.moe_layers()):
        layer.experts.layer = number
    gpt.to(device)
    initialize(gpt, InitialWeights(model, seed))
    return gpt


def initialize(gpt: GPT, weights: InitialWeights) -> None:
    """Draw this rank's weights."""
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    experts = {name for name, module in gpt.named_modules() if isinstance(module, Experts)}
    for name, parameter in gpt.named_parameters():
        parameter = parameter.detach()
        if name.rpartition(".")[0] not in experts:
            weights.draw(parameter, name)
            continue
        for i, weight in enumerate(parameter):
            weights.draw(weight, name, ep_rank * len(parameter) + i)


@dataclass(frozen=True)
class _Parts:
    """The classes of the dense part of a layer."""

    norm: type[nn.Module]
    qk_norm: type[nn.Module]
    column_linear: type[nn.Module]
    row_linear: type[nn.Module]
    attention: type[nn.Module]


def _torch_parts() -> _Parts:
    return _Parts(
        WrappedTorchNorm, WrappedTorchNorm, ColumnParallelLinear, RowParallelLinear, CausalAttention
    )


def _transformer_engine_parts() -> _Parts:
    # Norm and linear are separate, though TransformerEngine also has a fused module: parameters
    # then have the same names as on a CPU, and a checkpoint can move between machines.
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TERowParallelLinear,
    )

    from models.rms_norm import RMSNorm

    return _Parts(
        RMSNorm, RMSNorm, TEColumnParallelLinear, TERowParallelLinear, TEDotProductAttention
    )


def _block_spec(config: GPTConfig, parts: _Parts) -> TransformerBlockSubmodules:
    qk_norm = parts.qk_norm if config.qk_layernorm else IdentityOp
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column_linear,
                    core_attention=parts.attention,
                    linear_proj=parts.row_linear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=_get_add,
            pre_mlp_layernorm=parts.norm,
            mlp=ExpertParallelMoE,
            mlp_bda=_get_add,
        ),
    )
    return TransformerBlockSubmodules([layer] * config.num_layers, layer_norm=parts.norm)


def _get_add(training: bool, fused: bool) -> Callable[..., Tensor]:
    """The function by which megatron-core adds a layer's output to the residual; no bias, no
    dropout.

    Its own is compiled by torch.compile in every process, which takes seconds at the first step.
    """

    def add(part: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        return residual + part[0]

    return add
