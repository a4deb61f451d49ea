"""The training loop: one for CPU and GPU."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.distributed.fsdp import FSDPModule

from models.gpt import GPT, build_gpt, why_not
from train import parallel
from train.checkpoint import checksums
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.files import newest
from train.checkpoint.same_run import check_same_run
from train.config import Config, ConfigError
from train.data.batches import Batch, Corpus
from train.failure import Preempted, TrainingFailed
from train.metrics import flops
from train.metrics.environment import describe_environment
from train.metrics.recorder import Recorder
from train.metrics.step import StepMetrics
from train.metrics.throughput import Meter, peak_bf16_flops
from train.optim import build_optimizer, learning_rate, set_learning_rate, takes_grad_scale
from train.parallel import Ranks
from train.profiling.step import PartMaker, StepProfiler, untimed
from train.safety.guards import Safety
from train.safety.nonfinite import LossGuard
from train.safety.watchdog import MARGIN_S


def check(config: Config) -> None:
    """Find what cannot run here before anything starts. Raises ConfigError."""
    device = resolve_device(config)
    if device == "cuda":
        check_gpus()
    if config.train.deterministic:
        make_deterministic()
    if device == "cuda" and resolve_dtype(config, device) is not torch.bfloat16:
        raise ConfigError(
            f"train.dtype={config.train.dtype} cannot run on a GPU: the experts' GEMMs there take "
            "bfloat16; set train.dtype=bf16"
        )
    reason = why_not(config.model, config.moe, device, config.parallel.expert_parallel)
    if reason:
        raise ConfigError(reason)
    run_dir = config.run_dir
    check_same_run(run_dir, config)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir}: {error.strerror}") from None


def make_deterministic() -> None:
    """Rule out what makes a GPU's result depend on timing. Before CUDA or TransformerEngine start.

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


def check_gpus() -> None:
    """Raise ConfigError where a machine has fewer GPUs than processes: each needs its own."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise ConfigError(
            f"{processes} processes were started on this machine, and PyTorch sees {gpus} GPU(s) "
            f"here; start torchrun --nproc-per-node {gpus}"
        )


def resolve_dtype(config: Config, device: str) -> torch.dtype:
    """What forward and backward are computed in."""
    if config.train.dtype == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.dtype]


def train(config: Config, corpus: Corpus) -> None:
    """Train to `config.train.steps`, from the run folder's newest checkpoint if it has one."""
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    run_dir = config.run_dir
    found = newest(run_dir / "checkpoints")
    # A damaged last checkpoint is found out below, and its steps are trained again.
    if found and found[0] >= config.train.steps and not checksums.damage(found[1]):
        if int(os.environ.get("RANK", "0")) == 0:
            print(
                f"{run_dir} has already trained {found[0]} steps; raise train.steps="
                f"{config.train.steps} to go on, or choose another run.name"
            )
        return

    timeout_s = config.parallel.timeout_s
    ranks = parallel.start(
        device, config.parallel.expert_parallel, config.train.seed, timeout_s + MARGIN_S
    )
    model = build_gpt(
        config.model, config.moe, ranks.device, config.train.seed, config.train.deterministic
    )
    parallel.shard(model, ranks, dtype, config.parallel.reshard_after_forward)
    optimizer = build_optimizer(model, config.optim, device == "cuda", dtype)

    checkpointer = Checkpointer(run_dir, config, ranks, model, optimizer)
    first_step, metrics_so_far = checkpointer.restore()
    step_metrics = StepMetrics(model, config.accumulation(ranks.world_size))
    if metrics_so_far:
        step_metrics.load_state(metrics_so_far)

    environment = describe_environment(ranks.device, ranks.world_size)
    count = flops.count(config.model, config.moe)
    tokens_per_step = config.tokens_per_step(ranks.world_size)
    peak = peak_bf16_flops(environment["device_name"]) if device == "cuda" else None
    meter = Meter(
        count.flops_per_token, ranks.world_size, ranks.device, config.train.warmup_steps, peak
    )
    recorder = None
    if ranks.is_first:
        config.save(run_dir / "config.yaml")
        (run_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
        recorder = Recorder(config, run_dir, environment, first_step)
        recorder.progress.start(
            {
                "run": str(run_dir),
                "machine": f"{ranks.world_size} x {environment['device_name']}",
                "model": f"{count.total_params / 1e6:,.1f} M parameters, "
                f"{count.active_params / 1e6:,.1f} M active per token",
                "experts": f"{config.moe.num_experts}, top {config.moe.top_k}; "
                f"{config.moe.num_experts // config.parallel.expert_parallel} on each of "
                f"{config.parallel.expert_parallel} rank(s)",
                "path": f"{config.moe.path}, computed in {str(dtype).removeprefix('torch.')}",
                "runs on": model.runtime.description,
                "batch": f"{config.global_batch(ranks.world_size)} sequences of "
                f"{config.model.seq_len} = {tokens_per_step:,} tokens a step "
                f"({config.accumulation(ranks.world_size)} micro-batch(es) of "
                f"{config.train.micro_batch} a rank)",
                "data": corpus.describe(),
                "tracking": recorder.tracker.describe(),
                "start": f"step {first_step} of {config.train.steps}"
                + (f", from {checkpointer.folder}" if first_step else ""),
            }
        )

    with Safety(run_dir, config, ranks, model, checkpointer) as safety:
        try:
            _train_steps(
                *(config, corpus, ranks, model, optimizer, meter, step_metrics, recorder),
                *(safety, first_step),
            )
        except BaseException as error:
            safety.watchdog.close()  # what follows is no step
            if recorder:
                recorder.give_up(error.exit_code if isinstance(error, TrainingFailed) else 1)
            if isinstance(error, Preempted):
                # torchrun ends them all when the first has ended, and rank 0 may still upload.
                safety.stop.wait_for_all()
            raise
    if recorder:
        recorder.finish(meter.summary())
    model.runtime.dispatcher.close()
    dist.barrier()
    parallel.stop()


def _train_steps(
    config: Config,
    corpus: Corpus,
    ranks: Ranks,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    step_metrics: StepMetrics,
    recorder: Recorder | None,
    safety: Safety,
    first_step: int,
) -> None:
    """The steps from `first_step` on. Raises Preempted after a step at which it is to stop."""
    tokens_per_step = config.tokens_per_step(ranks.world_size)
    profiler = StepProfiler(model, config.train, ranks.device, config.run_dir, ranks.is_first)
    batches = corpus.train_batches(ranks.rank, ranks.world_size, first_step)
    meter.start()
    for step in range(first_step, config.train.steps):
        rate = learning_rate(step, config.train.steps, config.optim)
        set_learning_rate(optimizer, rate)
        safety.loss.begin(step)
        done = step + 1
        is_last = done == config.train.steps
        is_logged = done % config.train.log_every == 0 or is_last
        step_metrics.routing.watch(entropy=is_logged)
        traced = profiler.traces(done)
        with meter.pause() if traced else nullcontext(), profiler.step(done, is_logged) as part:
            data_seconds = _step(
                model, optimizer, batches, config, ranks, step_metrics, safety.loss, part
            )
        if not traced:
            meter.step(tokens_per_step, data_seconds)

        stopping = safety.stop.agreed()
        every = config.train.valid_every
        validating = every and (done % every == 0 or is_last)
        every = config.checkpoint.every
        saving = is_last or stopping or (every and done % every == 0)
        if is_logged or validating or saving:
            safety.loss.check()
        metrics: dict[str, float] = {}
        if is_logged:
            metrics |= step_metrics.collect(rate) | meter.interval() | profiler.metrics()
            metrics |= safety.checkpointer.metrics()
        if validating:
            with meter.pause():
                metrics["loss/valid"] = validate(model, corpus, config, ranks)
        if metrics and recorder:
            recorder.write(done, done * tokens_per_step, metrics)
        if recorder and is_logged and recorder.wants_picture(done):
            with meter.pause():
                recorder.picture(step_metrics.routing.row(done))
        if saving:
            with meter.pause():
                safety.checkpointer.save(done, step_metrics.state())
        if stopping and not is_last:
            safety.leave(done, stopping, step_metrics.state())
    # It can have begun past its last step: train.steps was lowered, and the newest one damaged.
    safety.checkpointer.finish(max(first_step, config.train.steps), step_metrics.state())


def _step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    config: Config,
    ranks: Ranks,
    metrics: StepMetrics,
    guard: LossGuard,
    part: PartMaker = untimed,
) -> float:
    """One optimizer step; returns the seconds it waited for data. `part` times parts of it."""
    accumulation = config.accumulation(ranks.world_size)
    tokens_per_step = config.tokens_per_step(ranks.world_size)
    # The stock auxiliary losses are means over a micro-batch, while gradients are summed.
    # Filled there, because copying a number to a GPU waits for all that the GPU has to do.
    MoEAuxLossAutoScaler.set_loss_scale(
        torch.full((), 1 / (accumulation * ranks.world_size), device=ranks.device)
    )
    data_seconds = 0.0
    total = torch.zeros((), device=ranks.device)
    for micro_batch in range(accumulation):
        begin = time.perf_counter()
        batch = next(batches)
        data_seconds += time.perf_counter() - begin
        batch = batch.to(ranks.device)
        # Gradients travel once a step, with the last micro-batch.
        model.set_requires_gradient_sync(micro_batch == accumulation - 1)
        loss = _losses(model, batch, config).sum() / tokens_per_step
        loss.backward()
        guard.note(micro_batch, loss)
        total += loss.detach()
    with part("optimizer"):
        norm = parallel.clip_gradients(list(model.parameters()), config.optim.clip_grad, optimizer)
        guard.note(accumulation, norm)
        if guard.skips_this_step():
            metrics.skipped += 1
            if takes_grad_scale(optimizer):
                optimizer.grad_scale = None  # type: ignore[attr-defined]  # this step's, so NaN
        else:
            metrics.loss += total
            metrics.grad_norm = norm
            model.forget_prepared_weights()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    metrics.steps += 1
    return data_seconds


@torch.no_grad()
def validate(model: GPT, corpus: Corpus, config: Config, ranks: Ranks) -> float:
    """Mean loss over the validation batches, the same sequences every time."""
    model.eval()
    runtime = model.runtime
    sent, dropped = runtime.dispatcher.bytes_sent, runtime.counts.dropped_rows
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch in corpus.valid_batches(ranks.rank, ranks.world_size):
        losses = _losses(model, batch.to(ranks.device), config)
        total += torch.stack([losses.sum().double(), total.new_tensor(losses.numel())])
    dist.all_reduce(total)
    model.train()
    # What is logged is training's.
    runtime.dispatcher.bytes_sent, runtime.counts.dropped_rows = sent, dropped
    # Nothing else would free gathered weights, since no backward pass follows.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return float(total[0] / total[1])


def _losses(model: GPT, batch: Batch, config: Config) -> torch.Tensor:
    positions = batch.positions if config.data.document_mask else None
    return model(batch.tokens, batch.labels, positions)
