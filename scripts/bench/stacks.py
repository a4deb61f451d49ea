"""What `scripts.bench` trains: our paths, and stock megatron-core, by name.

    bf16                       a path
    fp8_direct:prepare         a path with a flag; more with more colons
    stock:bf16                 megatron-core's, see scripts/bench/stock_megatron.py
    stock:fp8:grouped

Flags of ours: `triton`, `te_dequantize` (other operations, `models/fp8/operations.py`), `recompute`
(`moe.recompute=true`), `prepare` (`optim.prepare_weights=true`), `waits` (`moe.capacity=null`),
`v1`, `v2` (`moe.dispatch=deep_ep_v1`, `deep_ep_v2`), `per_expert` (FP8 GEMMs of TransformerEngine
one by one, as before cuBLAS 13.6), `bf16_moment` (`optim.first_moment_dtype=bf16`).
Flags of both: `environment`, the variables that megatron-core's authors set for their own
measurements; `bf16_grads`, gradients summed in BF16 (`optim.grad_dtype=bf16`).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from models.config import PATH_NAMES, PathName
from models.fp8 import operations
from models.fp8.linear import Fp8Linear
from models.fp8.operations import VARIANTS, Variant
from models.gpt import GPT, build_gpt
from models.moe.paths import PATHS
from models.moe.runtime import Runtime, why_not
from scripts.bench.results import Row
from train import allocator, loop, parallel, preflight
from train.config import Config, ConfigError, load
from train.data import batches as data
from train.data.batches import Batch
from train.optim import DTYPES, build_optimizer
from train.parallel import Ranks

FLAG_KEYS = {
    "recompute": "moe.recompute=true",
    "prepare": "optim.prepare_weights=true",
    "waits": "moe.capacity=null",
    "v1": "moe.dispatch=deep_ep_v1",
    "v2": "moe.dispatch=deep_ep_v2",
    "bf16_grads": "optim.grad_dtype=bf16",
    "bf16_moment": "optim.first_moment_dtype=bf16",
}
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "NCCL_GRAPH_REGISTER": "0",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
}
"""Variables of the flag `environment`: Megatron-Bridge's for H100s."""
PATH_FLAGS = (*VARIANTS, *FLAG_KEYS, "per_expert", "environment")
PEERS = ("bf16", "fp8")
PEER_FLAGS = (
    "experimental", "router_padding", "fp8_param", "no_overlap", "no_wgrad_fusion", "environment",
    "bf16_grads", "graphs", "attention_graphs", "cutlass", "grouped", "ep_overlap",
)  # fmt: skip
PEER_ENVIRONMENT = {
    "cutlass": {"NVTE_USE_CUTLASS_GROUPED_GEMM": "1"},
    # megatron-core requires it before it uses the fuser; Hopper then runs operations one by one.
    "grouped": {"NVTE_CUTEDSL_FUSED_GROUPED_MLP": "1"},
}
"""What the environment of a process must say before TransformerEngine is loaded."""
ROUTINGS = ("balanced", "natural")


@dataclass(frozen=True)
class Spec:
    """One stack to measure."""

    stack: str  # `ours` or `megatron-core`
    path: str
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = (self.path, *self.flags)
        return ":".join(parts if self.stack == "ours" else ("stock", *parts))

    @property
    def environment(self) -> dict[str, str]:
        """Variables for its processes, in addition to those that are set already."""
        found = allocator.default(os.environ) if self.stack == "ours" else {}  # as in a run
        found |= ENVIRONMENT if "environment" in self.flags else {}
        for flag in self.flags:
            found |= PEER_ENVIRONMENT.get(flag, {})
        return found

    def columns(self) -> Row:
        """Its part of a results row."""
        variants = [flag for flag in self.flags if flag in VARIANTS]
        rest = [flag for flag in self.flags if flag not in VARIANTS]
        row: Row = {"stack": self.stack, "path": self.path}
        if variants and self.stack == "ours":
            row["operations"] = variants[0]
        return row | {"flags": rest}


def parse(text: str) -> Spec:
    """One of the names above. Raises ConfigError."""
    is_peer, _, rest = text.partition(":")
    peer = is_peer == "stock"
    path, *flags = (rest if peer else text).split(":")
    known = PEERS if peer else PATH_NAMES
    if path not in known:
        raise ConfigError(f"stack {text}: no path {path!r}; known: {', '.join(known)}")
    having = {str(variant): paths for variant, paths in VARIANTS.items()}
    having["per_expert"] = tuple(name for name in PATH_NAMES if PATHS[name].LINEAR is Fp8Linear)
    for flag in flags:
        if flag not in (PEER_FLAGS if peer else PATH_FLAGS) or (
            not peer and path not in having.get(flag, (path,))
        ):
            raise ConfigError(f"stack {text}: {path} takes no {flag!r}")
    if {"v1", "v2"} <= set(flags):
        raise ConfigError(f"stack {text}: either DeepEP v1 or v2 dispatches, not both")
    return Spec("megatron-core" if peer else "ours", path, tuple(flags))


def parse_all(text: str) -> list[Spec]:
    """Names with commas between. Raises ConfigError."""
    specs = [parse(item) for item in text.split(",") if item]
    if not specs:
        raise ConfigError("no stack is named: nothing to measure")
    if len(set(specs)) < len(specs):
        raise ConfigError("a stack is named twice")
    return specs


def config_of(
    spec: Spec, path: str, overrides: list[str], routing: str, micro_batch: int | None
) -> Config:
    """What a stack trains with. Raises ConfigError."""
    # By default a GPU prepares weights; here the flag in the row says so.
    keys = ["optim.prepare_weights=false", *overrides]
    if micro_batch is not None:
        keys.append(f"train.micro_batch={micro_batch}")
    if routing == "natural":
        # The config's capacity is for even routing; here nothing may be dropped.
        keys += ["moe.force_balance=false", "moe.capacity=default"]
    else:
        keys.append("moe.force_balance=true")
    keys += [key for flag, key in FLAG_KEYS.items() if flag in spec.flags]
    # The peer has paths of its own; the rest of the config is common.
    keys.append(f"moe.path={spec.path if spec.stack == 'ours' else 'bf16'}")
    config = load(path, keys)
    if config.data.document_mask:
        raise ConfigError("data.document_mask=true is not measured; leave it out")
    if spec.stack != "ours":
        if config.moe.expert_bias:
            raise ConfigError(
                f"stack {spec}: stock megatron-core has no moe.expert_bias with a softmax; leave "
                "it out"
            )
        if preflight.resolve_device(config) == "cpu":
            raise ConfigError(f"stack {spec}: stock megatron-core trains on GPUs alone")
        if preflight.resolve_dtype(config, "cuda") != torch.bfloat16:
            raise ConfigError(
                f"stack {spec}: stock megatron-core is run in BF16; unset train.dtype"
            )
    return config


class Stack(Protocol):
    """A model with its optimizer, ready to train."""

    dispatch: str
    description: str

    @property
    def model(self) -> nn.Module: ...

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """One optimizer step; this rank's share of the mean loss: ranks add up to it."""

    def dropped_rows(self) -> int:
        """Rows dropped on this rank since the last call. Waits for the device."""

    def redone_steps(self) -> int:
        """Steps that were repeated for lack of room since the last call."""

    def close(self) -> None:
        """Release what outlives the model. All ranks together."""


class Ours:
    """The model and the step of `python -m train`."""

    def __init__(self, config: Config, ranks: Ranks, flags: tuple[str, ...] = ()) -> None:
        """Raises ConfigError where the path cannot run here."""
        device = ranks.device.type
        reason = why_not(config.model, config.moe, device, config.parallel.expert_parallel)
        if reason:
            raise ConfigError(reason)
        self.config, self.ranks = config, ranks
        self.model = build_gpt(
            config.model, config.moe, ranks.device, config.train.seed, config.train.deterministic
        )
        for variant in VARIANTS:
            if variant in flags:
                use_operations(self.model, config.moe.path, device, variant)
        if "per_expert" in flags:
            use_gemms_per_expert(self.model)
        self.dispatch = self.model.runtime.dispatcher.name
        self.description = self.model.runtime.description
        dtype = preflight.resolve_dtype(config, device)
        parallel.shard(
            *(self.model, ranks, dtype, config.parallel.reshard_after_forward),
            DTYPES[config.optim.grad_dtype],
        )
        optimizer = build_optimizer(self.model, config.optim, device == "cuda", dtype)
        # One for all steps, since a new one begins to count at zero.
        self.training = loop.Training(config, ranks, self.model, optimizer)

    def step(self, batches: Iterator[Batch]) -> Tensor:
        self.training.metrics.loss.zero_()
        loop.step(self.training, batches)
        return self.training.metrics.loss.clone()

    def dropped_rows(self) -> int:
        counts = self.model.runtime.counts
        dropped, counts.dropped_rows = int(counts.dropped_rows), 0
        return dropped

    def redone_steps(self) -> int:
        metrics = self.training.metrics
        redone, metrics.redone = metrics.redone, 0
        return redone

    def close(self) -> None:
        self.model.runtime.dispatcher.close()


def use_operations(model: GPT, path: PathName, device: str, variant: Variant) -> None:
    """Run the model's path with other operations."""
    chosen = operations.choose(path, device, variant)
    runtime = model.runtime.with_operations(chosen.operations, device)
    said = (chosen.description, runtime.linear.DESCRIPTION)
    description = "; ".join((*filter(None, said), f"dispatch by {runtime.dispatcher.name}"))
    use_runtime(model, replace(runtime, description=description))


def use_gemms_per_expert(model: GPT) -> None:
    """Use TransformerEngine's linear layer of an older cuBLAS: the host waits for the count of
    rows."""
    from models.fp8.te import TELinear

    runtime = model.runtime
    linear = TELinear(runtime.ops)
    description = runtime.description.replace(runtime.linear.DESCRIPTION, linear.DESCRIPTION)
    use_runtime(model, replace(runtime.waiting(), linear=linear, description=description))


def use_runtime(model: GPT, runtime: Runtime) -> None:
    """Another runtime for a model and its layers."""
    model.config.moe_runtime = runtime
    for layer in model.moe_layers():
        layer.experts.runtime = runtime


def build(spec: Spec, config: Config, ranks: Ranks) -> Stack:
    """The stack on this rank. All ranks together."""
    if spec.stack == "ours":
        return Ours(config, ranks, spec.flags)
    from scripts.bench.stock_megatron import StockMegatron

    return StockMegatron(config, ranks, spec.path, spec.flags)


def batches(config: Config, ranks: Ranks, routing: str, steps: int) -> list[Batch]:
    """This rank's micro-batches of `steps` optimizer steps; they depend on the seed, not on the
    stack.

    Balanced routing does not look at tokens: they are random. Natural routing uses the config's
    text, since a router that learns from it loads experts as in a training run.
    """
    count = steps * config.accumulation(ranks.world_size)
    if routing == "natural":
        text = data.load(config).train_batches(ranks.rank, ranks.world_size)
        return [next(text).to(ranks.device) for _ in range(count)]
    generator = torch.Generator().manual_seed(config.train.seed * ranks.world_size + ranks.rank)
    shape = (config.train.micro_batch, config.model.seq_len + 1)
    positions = torch.arange(config.model.seq_len).expand(shape[0], -1)
    found = []
    for _ in range(count):
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions)
        found.append(batch.to(ranks.device))
    return found


def seed_everything(config: Config, ranks: Ranks) -> None:
    """Every stack draws the same: forced routing is drawn in the forward pass, on the device."""
    torch.manual_seed(config.train.seed + ranks.rank)
    tensor_parallel.model_parallel_cuda_manual_seed(
        config.train.seed, inference_rng_tracker=ranks.device.type != "cuda"
    )
