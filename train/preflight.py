"""Whether a run can start on this machine; if not, one line says why before anything starts."""

import logging
import os
import shutil
from pathlib import Path

import torch

from models.moe.runtime import why_not
from train import run_folder
from train.checkpoint import hf_reader
from train.checkpoint.files import folder_of, newest
from train.checkpoint.same_run import check_same_run
from train.config import Config, ConfigError, world_size_from_env
from train.data.batches import PREFETCH
from train.metrics import flops, tensorboard
from train.planning import warning as planning

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
"""Where data workers put their batches; a container has 64 MB of it by default."""

BYTES_PER_PARAMETER = 16
"""On a CPU: the weight, its gradient and AdamW's two means, all in float32."""

BYTES_PER_TOKEN = 3 * 8
"""Bytes of a batch per token: three int64."""


def check(config: Config) -> None:
    """Find what cannot run here before anything starts. Raises ConfigError."""
    device = resolve_device(config)
    if device == "cuda":
        check_gpus()
    check_shared_memory(config)
    if config.train.deterministic:
        make_deterministic()
    if config.tracking.backend == "tensorboard" and (reason := tensorboard.why_not()) is not None:
        raise ConfigError(f"tracking.backend=tensorboard: {reason}, or set tracking.backend=wandb")
    if device == "cuda" and resolve_dtype(config, device) is not torch.bfloat16:
        raise ConfigError(
            f"train.dtype={config.train.dtype} cannot run on a GPU: the experts' GEMMs there take "
            "bfloat16; set train.dtype=bf16"
        )
    reason = why_not(config.model, config.moe, device, config.parallel.expert_parallel)
    if reason:
        raise ConfigError(reason)
    run_dir = config.run_dir
    run_folder.check(run_dir)
    check_same_run(run_dir, config)
    if config.model.init_from is not None and newest(folder_of(run_dir)) is None:
        hf_reader.source(config)
    if device == "cuda":
        warn_of_memory(config)
    else:
        warn_of_cpu_memory(config)
    run_folder.make(run_dir)


def make_deterministic() -> None:
    """Disable what makes a GPU's result depend on timing. Call it before CUDA or TransformerEngine
    start.

    These are sums whose order threads decide: in attention's backward pass (TransformerEngine), in
    the embedding's (PyTorch), and in GEMMs that split their sum (cuBLAS, by workspace).
    """
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory first would find reads of it, but costs a pass, and races with libraries
    # that write such memory on a stream of their own.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def resolve_device(config: Config) -> str:
    """`cpu` or `cuda`. Raises ConfigError where a GPU is asked for and there is none."""
    if config.train.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.device=cuda, but PyTorch sees no GPU; set train.device=cpu, or install a CUDA "
            "build of PyTorch on a machine with one"
        )
    return config.train.device


def check_shared_memory(config: Config) -> None:
    """Raise ConfigError where the batches that data workers keep ready have no room."""
    if not SHARED_MEMORY.is_dir():  # not Linux
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    workers = config.data.workers if config.data.name is None else min(config.data.workers, 1)
    # Each worker's, and one that is being trained on.
    batches = workers * PREFETCH + 1 if workers else 0
    batch = config.train.micro_batch * config.model.seq_len * BYTES_PER_TOKEN
    needed = batches * batch * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed > free:
        raise ConfigError(
            f"data.workers={config.data.workers} needs {needed / 1e6:,.1f} MB of shared memory for "
            f"the batches of this machine's ranks, and {SHARED_MEMORY} has {free / 1e6:,.1f} MB "
            "free; give it more (docker run --shm-size=8g), or set data.workers=0"
        )


def check_gpus() -> None:
    """Raise ConfigError where a machine has fewer GPUs than processes: each needs its own."""
    if "LOCAL_RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "LOCAL_RANK is not in the environment, so every process would take the first GPU; "
            "start with torchrun, which sets it"
        )
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise ConfigError(
            f"{processes} processes were started on this machine, and PyTorch sees {gpus} GPU(s) "
            f"here; start torchrun --nproc-per-node {gpus}"
        )


def warn_of_memory(config: Config) -> None:
    """Warn, on the first rank, where the run is not planned to fit into its GPUs."""
    if os.environ.get("RANK", "0") != "0":
        return
    gpu = torch.cuda.get_device_properties(0)
    ranks = world_size_from_env()
    node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    reason = planning.why_not(config, ranks, node, gpu.total_memory, gpu.name)
    if reason is not None:
        log.warning("%s", reason)


def warn_of_cpu_memory(config: Config) -> None:
    """Warn, on the first rank, where this machine cannot hold its ranks' share of the parameters.

    It is what a run on a model for GPUs meets where PyTorch sees none.
    """
    memory = machine_memory()
    if os.environ.get("RANK", "0") != "0" or memory is None:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / world_size_from_env()
    parameters = flops.count(config.model, config.moe).total_params
    needed = parameters * BYTES_PER_PARAMETER * here
    if needed > memory:
        auto = config.train.device == "auto"
        log.warning(
            "%s this run needs %.1f GB of memory for weights, gradients and AdamW's means, and "
            "this machine has %.1f; take a smaller model (configs/demo_cpu.yaml), or a machine "
            "with GPUs and a CUDA build of PyTorch",
            "PyTorch sees no GPU, and on the CPU" if auto else "on a CPU",
            needed / 1e9,
            memory / 1e9,
        )


def machine_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def resolve_dtype(config: Config, device: str) -> torch.dtype:
    """The dtype of forward and backward."""
    if config.train.dtype == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.dtype]
