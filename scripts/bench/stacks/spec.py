"""A stack by its name: the flags there are, its environment, and the config that it trains with.

    bf16                       a path
    fp8_direct:prepare         a path with a flag; more with more colons
    stock:bf16                 stock megatron-core
    stock:fp8:grouped          with a flag: its flags are in rungs.py

Flags of ours: `triton`, `te_dequantize` (other operations, `models/fp8/operations.py`), those that
set a config key (`FLAG_KEYS`), and `per_expert` (FP8 GEMMs of TransformerEngine one by one, as
before cuBLAS 13.6). Flags of both: `environment`, the variables that megatron-core's authors set
for their own measurements; `bf16_grads`, gradients summed in BF16.
"""

import os
from dataclasses import dataclass

import torch

from models.config import PATH_NAMES
from models.fp8.linear import Fp8Linear
from models.fp8.operations import VARIANTS
from models.moe.paths import PATHS
from scripts.bench.results import Row
from scripts.bench.stacks.rungs import RUNG_ENVIRONMENT, RUNGS
from train import allocator, preflight
from train.config import Config, ConfigError, load

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
EXCLUSIVE = (("v1", "v2"), tuple(VARIANTS))
"""Flags of which a stack has one at most: who dispatches, whose operations."""
STOCK_PATHS = ("bf16", "fp8")
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
            found |= RUNG_ENVIRONMENT.get(flag, {})
        return found

    @property
    def unset(self) -> dict[str, str]:
        """Those of `environment` that this process, and so a GPU's libraries, lack."""
        return {k: v for k, v in self.environment.items() if os.environ.get(k) != v}

    @classmethod
    def of(cls, row: Row) -> "Spec":
        """The stack of a results row: `columns` backward."""
        operations = [row["operations"]] if "operations" in row else []
        return cls(row["stack"], row["path"], (*operations, *row.get("flags", ())))

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
    known = STOCK_PATHS if peer else PATH_NAMES
    if path not in known:
        raise ConfigError(f"stack {text}: no path {path!r}; known: {', '.join(known)}")
    having = {str(variant): paths for variant, paths in VARIANTS.items()}
    having["per_expert"] = tuple(name for name in PATH_NAMES if PATHS[name].LINEAR is Fp8Linear)
    for flag in flags:
        if flag not in (RUNGS if peer else PATH_FLAGS) or (
            not peer and path not in having.get(flag, (path,))
        ):
            raise ConfigError(f"stack {text}: {path} takes no {flag!r}")
        if flags.count(flag) > 1:
            raise ConfigError(f"stack {text}: {flag!r} is given twice; once does it")
    for exclusive in EXCLUSIVE:
        given = [flag for flag in flags if flag in exclusive]
        if len(given) > 1:
            raise ConfigError(f"stack {text}: one of {' and '.join(given)} at most; leave one out")
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
