"""The peer of `scripts/bench/train.py`: stock megatron-core, with nothing of ours in it.

Its own layers from TransformerEngine, its flex dispatcher over DeepEP, its fused permutation,
router and cross-entropy, its DistributedDataParallel with the distributed optimizer, and its
schedule. The model's shape, the batches, AdamW's settings and the routing are those of our config,
and it begins with our weights.

Its further options are chosen by name, and each is a rung of the ladder to its best configuration:

    environment       of the process (scripts/bench/stacks.py)
    experimental      megatron's experimental Triton kernels between DeepEP and the permutation
    bf16_grads        gradients are summed in BF16, and the precision-aware optimizer takes them;
                      its states stay float32
    graphs            CUDA graphs of the router and what follows it; needs megatron-core 0.19
    attention_graphs  those, and of attention
    cutlass           TransformerEngine's CUTLASS GEMM of all experts (BF16)
    grouped           TransformerEngine's operation fuser, whose cuBLAS GEMM is one for all experts;
                      needs megatron-core 0.19 and cuBLAS 13.6
    ep_overlap        dispatch of one micro-batch beside the computation of another; needs at least
                      two a step
    router_padding    FP8: pad each expert's rows in the routing map, not in a pass of its own
    fp8_param         FP8: keep weights in FP8 between steps, and gather them in FP8; it begins with
                      weights of its own
    no_overlap        gradients and weights are communicated after the computation, not during it
    no_wgrad_fusion   TransformerEngine's weight gradients are not added to megatron's in the GEMM

Needs GPUs and TransformerEngine; the process groups come from `train/parallel.py`.
"""

import dataclasses
import gc
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.config import set_experimental_flag
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from models.initial_weights import InitialWeights
from models.moe.dispatch.deep_ep import half_of_the_multiprocessors
from scripts.bench import same_weights
from train.config import Config, ConfigError
from train.data.batches import Batch
from train.parallel import Ranks

GRAPHS_AFTER = 3
"""Steps that warm up before CUDA graphs are captured."""
_SMS = (
    "moe_flex_dispatcher_num_sms"
    if "moe_flex_dispatcher_num_sms" in TransformerConfig.__dataclass_fields__
    else "moe_deepep_num_sms"
)
"""The first from megatron-core 0.19 on."""


def choose_dispatch(expert_parallel: int) -> str:
    """`deepep` where it is installed and the group has more than one rank, otherwise `alltoall`."""
    return "deepep" if expert_parallel > 1 and fused_a2a.HAVE_DEEP_EP else "alltoall"


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


class StockMegatron:
    """A model, its optimizer and its step. All ranks build it together."""

    def __init__(self, config: Config, ranks: Ranks, path: str, flags: tuple[str, ...]) -> None:
        """`path` is `bf16` or `fp8`; `flags` are some of those at the top of this file."""
        self.device = ranks.device
        self.dispatch = choose_dispatch(config.parallel.expert_parallel)
        self.description = "TransformerEngine layers, fused permute and router, distributed " + (
            f"optimizer; dispatch by {self.dispatch}" + "".join(f"; {flag}" for flag in flags)
        )
        self.accumulation = config.accumulation(ranks.world_size)
        self.share = 1 / (self.accumulation * ranks.world_size)
        self.sizes = {
            "seq_length": config.model.seq_len,
            "micro_batch_size": config.train.micro_batch,
        }
        set_experimental_flag("experimental" in flags)
        self.graphs_after = GRAPHS_AFTER if graphed_modules(flags) else None
        if self.graphs_after:
            # Nothing can be captured while the stream that all others wait for is in use.
            torch.cuda.set_stream(torch.cuda.Stream())
            model_parallel_cuda_manual_seed(
                config.train.seed, te_rng_tracker=True, force_reset_rng=True
            )
            unset_num_microbatches_calculator()
            init_num_microbatches_calculator(
                ranks.rank,
                global_batch_size=config.global_batch(ranks.world_size),
                micro_batch_size=config.train.micro_batch,
                data_parallel_size=ranks.world_size,
            )

        arguments = transformer_arguments(config, path, flags, self.dispatch)
        # As ours: nothing runs concurrently with DeepEP in this schedule either.
        arguments[_SMS] = config.moe.dispatch_sms or half_of_the_multiprocessors()
        check(arguments)
        transformer = TransformerConfig(**arguments)
        self.transformer = transformer
        gpt = GPTModel(
            transformer,
            get_gpt_layer_with_transformer_engine_spec(
                num_experts=config.moe.num_experts,
                moe_grouped_gemm=True,
                qk_layernorm=config.model.qk_norm,
            ),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.seq_len,
            position_embedding_type="rope",
            rotary_base=config.model.rope_base,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
        )
        gpt.cuda(ranks.device)
        if "fp8_param" not in flags:  # TransformerEngine keeps the values that it quantized first
            same_weights.draw(gpt, InitialWeights(config.model, config.train.seed))
        if "no_wgrad_fusion" not in flags:
            # Not by the config: megatron's own output layer would then require an extension of
            # APEX.
            for module in gpt.modules():
                if hasattr(module, "fuse_wgrad_accumulation"):
                    module.fuse_wgrad_accumulation = True

        overlap = self.overlap = "no_overlap" not in flags
        self.model = DistributedDataParallel(
            transformer,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32="bf16_grads" not in flags,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
                fp8_param_gather="fp8_param" in flags,
            ),
            Float16Module(transformer, gpt),
        )
        self.optimizer = get_megatron_optimizer(
            _optimizer_config(config, path, flags), [self.model], use_gloo_process_groups=False
        )
        # Megatron's scheduler would apply this; without it norms would decay too.
        for group in self.optimizer.param_groups:
            group["weight_decay"] = config.optim.weight_decay * group["wd_mult"]
        # Our loop sets this as a number, megatron's schedule as a vector of one.
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        self.steps = 0
        transformer.no_sync_func = self.model.no_sync
        transformer.finalize_model_grads_func = finalize_model_grads
        self.forward_backward = get_forward_backward_func()

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """One optimizer step; this rank's share of the mean loss: ranks add up to it."""
        if self.steps == self.graphs_after:
            self._capture()
        self.steps += 1
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=self.accumulation,
            **self.sizes,
        )
        self.optimizer.step()
        return torch.stack(losses).sum() * self.share

    def dropped_rows(self) -> int:
        """None: no capacity is set."""
        return 0

    def redone_steps(self) -> int:
        """None: its layers wait."""
        return 0

    def _capture(self) -> None:
        """Capture graphs of every layer, as megatron's own training loop does after warming up."""
        from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

        helper = TECudaGraphHelper(
            model=[self.model],
            config=self.transformer,
            seq_length=self.sizes["seq_length"],
            micro_batch_size=self.sizes["micro_batch_size"],
            optimizers=[self.optimizer],
        )
        if self.overlap:
            self.model.disable_forward_pre_hook(param_sync=False)
        helper.create_cudagraphs()
        if self.overlap:
            self.model.enable_forward_pre_hook()
            helper.cuda_graph_set_manual_hooks()

    def close(self) -> None:
        """Release what outlives the model. All ranks together: DeepEP's buffer is shared."""
        # Hooks inside autograd's C++ nodes reference the model, where Python's collector cannot see
        # them.
        self.model.grad_accs.clear()
        set_experimental_flag(False)
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        if fused_a2a._buffer is not None:
            gc.collect()
            torch.cuda.synchronize()
            dist.barrier()  # by the CPU: nobody's kernels use it any more
            fused_a2a._buffer = None
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:  # float32 copies, which the model holds too
                parameter.untyped_storage().resize_(0)
        for module in self.model.modules():
            getattr(module, "_fp8_workspaces", {}).clear()
        for buffer in (*self.model.buffers, *self.model.expert_parallel_buffers):
            for flat in (buffer.param_data, buffer.grad_data):
                if flat is not None:
                    flat.untyped_storage().resize_(0)
        free_large_tensors(self.device)

    def _forward_step(
        self,
        batches: Iterator[Batch],
        model: DistributedDataParallel | GPTModel,
        return_schedule_plan: bool = False,
    ) -> tuple[Any, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        batch = next(batches).to(self.device)
        if return_schedule_plan:  # `ep_overlap`: megatron takes two micro-batches apart and mixes
            plan = get_attr_wrapped_model(model, "build_schedule_plan")
            return plan(batch.tokens, None, None, labels=batch.labels), _mean
        return model(batch.tokens, None, None, labels=batch.labels), _mean


def free_large_tensors(device: torch.device, at_least: int = 1 << 27) -> None:
    """Free the memory of every tensor of `at_least` bytes on the device, wherever it is referenced.

    Megatron's modules are referenced from places that are never cleared, and the next stack needs
    the memory. Smaller tensors may be workspaces that TransformerEngine keeps for later use.
    """
    torch.cuda.synchronize(device)
    gc.collect()
    for tensor in (item for item in gc.get_objects() if isinstance(item, Tensor)):
        if tensor.device == device and type(tensor) in (Tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            if storage.size() >= at_least and storage.resizable():
                storage.resize_(0)


def _mean(losses: Tensor) -> tuple[Tensor, Tensor]:
    """The loss that megatron differentiates, after scaling it in place, and a copy to report."""
    loss = losses.float().mean()
    return loss, loss.detach().clone()


def _optimizer_config(config: Config, path: str, flags: tuple[str, ...]) -> OptimizerConfig:
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
