"""The peer of `scripts/bench/train/`: stock megatron-core, with nothing of ours in it.

Its own layers from TransformerEngine, its flex dispatcher over DeepEP, its fused permutation,
router and cross-entropy, its DistributedDataParallel with the distributed optimizer, and its
schedule. The model's shape, the batches, AdamW's settings and the routing are those of our config,
and it begins with our weights.

Further options are chosen by name, each a rung of the ladder to its best configuration: `rungs.py`.

Needs GPUs and TransformerEngine; the process groups come from `train/parallel.py`.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.config import set_experimental_flag
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from models.initial_weights import InitialWeights
from scripts.bench.stacks import same_weights
from scripts.bench.stacks.stock_settings import (
    check,
    choose_dispatch,
    dispatch_arguments,
    distributed_config,
    graphed_modules,
    optimizer_config,
    transformer_arguments,
)
from train.config import Config
from train.data.batches import Batch
from train.parallel import Ranks

GRAPHS_AFTER = 3
"""Steps that warm up before CUDA graphs are captured."""


class StockMegatron:
    """A model, its optimizer and its step. All ranks build it together."""

    def __init__(self, config: Config, ranks: Ranks, path: str, flags: tuple[str, ...]) -> None:
        """`path` is `bf16` or `fp8`; `flags` are some of `RUNGS`."""
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
            _prepare_capture(config, ranks)

        arguments = transformer_arguments(config, path, flags, self.dispatch)
        arguments |= dispatch_arguments(config)
        check(arguments)
        transformer = TransformerConfig(**arguments)
        self.transformer = transformer
        gpt = _build_gpt(transformer, config, ranks, flags)
        self.overlap = "no_overlap" not in flags
        self.model = DistributedDataParallel(
            transformer, distributed_config(flags), Float16Module(transformer, gpt)
        )
        self.optimizer = get_megatron_optimizer(
            optimizer_config(config, path, flags), [self.model], use_gloo_process_groups=False
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
        """None: its layers always wait."""
        return 0

    def waited_steps(self) -> int:
        """None: that counts exceptions."""
        return 0

    def room(self) -> float | None:
        """None: its layers always wait."""
        return None

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


def _prepare_capture(config: Config, ranks: Ranks) -> None:
    """What CUDA graphs need before the model is built."""
    # Nothing can be captured while the stream that all others wait for is in use.
    torch.cuda.set_stream(torch.cuda.Stream())
    model_parallel_cuda_manual_seed(config.train.seed, te_rng_tracker=True, force_reset_rng=True)
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(
        ranks.rank,
        global_batch_size=config.global_batch(ranks.world_size),
        micro_batch_size=config.train.micro_batch,
        data_parallel_size=ranks.world_size,
    )


def _build_gpt(
    transformer: TransformerConfig, config: Config, ranks: Ranks, flags: tuple[str, ...]
) -> GPTModel:
    """The model on this rank's GPU, with our initial weights."""
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
    return gpt


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
