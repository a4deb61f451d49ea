"""Training speed of the paths and of stock megatron-core, in turn, in one launch.

    torchrun --nproc-per-node 4 -m scripts.bench.train configs/qwen3_30b_a3b_8l.yaml \\
        [--paths bf16,fp8_direct] [--peers bf16,fp8] \\
        [--micro-batches 4,2] [--steps 8] [--warmup 4] [--repeats 3] [--out docs/results] \\
        [key=value ...]

Every stack has the same ranks, shape, batches (random tokens), AdamW and routing. A repeat builds
each of them, warms it up, times a window of steps, and frees it; the order is rotated from repeat
to repeat. The window is wall time from a barrier to the end of the last step's work on the slowest
rank. Nothing waits for the GPU between steps, since training does not; single steps are timed by
events on the GPU. Peak memory is the window's, on the fullest rank. Model FLOPs and MFU are counted
in the same way for all (`train/metrics/flops.py`).

`fp8_baseline:triton` is the baseline's layouts with the kernels of `fp8_compact`: it tells how much
of a difference is layout and how much is kernels. `fp8_baseline:te_dequantize` and
`fp8_compact:te_dequantize` take TransformerEngine's dequantize in the place of ours.
`fp8_direct:triton` leaves DeepGEMM alone, `:recompute` is `moe.recompute=true`, `:prepare` is
`optim.prepare_weights=true`. Peers take what
megatron-core offers beyond its usual flags the same way, `fp8:experimental`; see
`scripts/bench/stock_megatron.py`. `none` is no stack.

Writes `train_<config>.json` after every stack. A stack that fails gets a row with `error`, and the
others go on; after an error that leaves the GPU or NCCL unusable the run ends with what it has.
Exit codes: 0 done; 2 bad input, said in one line; 1 anything else.
"""

import argparse
import gc
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.config import PATH_NAMES, PathName
from models.fp8 import operations
from models.fp8.operations import VARIANTS, Variant
from models.gpt import GPT, build_gpt
from models.moe.runtime import why_not
from scripts.bench import results
from scripts.bench.machine import describe_machine
from train import loop, parallel, preflight
from train.config import Config, ConfigError, check_world, load, world_size_from_env
from train.data.batches import Batch
from train.failure import run_process
from train.metrics import flops
from train.metrics.throughput import GIB, peak_bf16_flops
from train.optim import build_optimizer
from train.parallel import Ranks
from train.profiling.timer import Timer

FLAG_KEYS = {"recompute": "moe.recompute=true", "prepare": "optim.prepare_weights=true"}
PATH_FLAGS = (*VARIANTS, *FLAG_KEYS)
PEERS = ("bf16", "fp8")
PEER_FLAGS = ("experimental", "router_padding", "fp8_param", "no_overlap", "no_wgrad_fusion")
UNUSABLE = ("CUDA error", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
"""What errors say after which neither this rank nor its peers can go on."""
LEFT_GIB = 0.5
"""What libraries may keep on the GPU after a stack is freed: workspaces of GEMMs and the like."""


@dataclass(frozen=True)
class Spec:
    """One stack to measure."""

    stack: str  # `ours` or `megatron-core`
    path: str
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.stack, ":".join((self.path, *self.flags))))


class Stack(Protocol):
    """A model with its optimizer, ready to train."""

    dispatch: str
    description: str

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """One optimizer step; this rank's share of the mean loss: ranks add up to it."""

    def close(self) -> None:
        """Let go of what outlives the model. All ranks together."""


class Ours:
    """The model and the step of `python -m train`."""

    def __init__(self, config: Config, ranks: Ranks, flags: tuple[str, ...]) -> None:
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
        self.dispatch = self.model.runtime.dispatcher.name
        self.description = self.model.runtime.description
        dtype = preflight.resolve_dtype(config, device)
        parallel.shard(self.model, ranks, dtype, config.parallel.reshard_after_forward)
        self.optimizer = build_optimizer(self.model, config.optim, device == "cuda", dtype)

    def step(self, batches: Iterator[Batch]) -> Tensor:
        training = loop.Training(self.config, self.ranks, self.model, self.optimizer)
        loop.step(training, batches)
        return training.metrics.loss

    def close(self) -> None:
        self.model.runtime.dispatcher.close()


def use_operations(model: GPT, path: PathName, device: str, variant: Variant) -> None:
    """Carry out the model's path with other operations."""
    chosen = operations.choose(path, device, variant)
    runtime = model.runtime.with_operations(chosen.operations, device)
    said = (chosen.description, runtime.linear.DESCRIPTION)
    description = "; ".join((*filter(None, said), f"dispatch by {runtime.dispatcher.name}"))
    runtime = replace(runtime, description=description)
    model.config.moe_runtime = runtime
    for layer in model.moe_layers():
        layer.experts.runtime = runtime


def build(spec: Spec, config: Config, ranks: Ranks) -> Stack:
    if spec.stack == "ours":
        return Ours(config, ranks, spec.flags)
    from scripts.bench.stock_megatron import StockMegatron

    return StockMegatron(config, ranks, spec.path, spec.flags)


def random_batches(config: Config, ranks: Ranks, steps: int) -> list[Batch]:
    """Micro-batches of `steps` optimizer steps, of this rank; the seed decides, not the stack."""
    generator = torch.Generator().manual_seed(config.train.seed * ranks.world_size + ranks.rank)
    shape = (config.train.micro_batch, config.model.seq_len + 1)
    positions = torch.arange(config.model.seq_len).expand(shape[0], -1)
    batches = []
    for _ in range(steps * config.accumulation(ranks.world_size)):
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        batches.append(
            Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions).to(
                ranks.device
            )
        )
    return batches


def seed_everything(config: Config, ranks: Ranks) -> None:
    """Every stack draws the same: forced routing is drawn in the forward pass, on the device."""
    torch.manual_seed(config.train.seed + ranks.rank)
    tensor_parallel.model_parallel_cuda_manual_seed(
        config.train.seed, inference_rng_tracker=ranks.device.type != "cuda"
    )


@dataclass
class Window:
    """What was measured in one repeat; the same on every rank."""

    step_seconds: float
    """Mean over the window, on the slowest rank."""
    single_seconds: list[float]
    """Each step by itself."""
    peak_gib: float | None
    """Most memory that tensors had, on the fullest rank; None on a CPU."""
    final_loss: float


def measure(
    stack: Stack, batches: Sequence[Batch], ranks: Ranks, warmup: int, steps: int
) -> Window:
    """Warm up and time `steps` steps. All ranks call it."""
    on_gpu = ranks.device.type == "cuda"
    queue = itertools.cycle(batches)
    for _ in range(warmup):
        stack.step(queue)
    gc.collect()
    _wait(ranks)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(ranks.device)
    dist.barrier()
    _wait(ranks)

    timer, laps = Timer(ranks.device), []
    begin = time.perf_counter()
    for _ in range(steps):
        timer.start()
        loss = stack.step(queue)
        laps.append(timer.stop())
    _wait(ranks)
    seconds = (time.perf_counter() - begin) / steps

    singles = [lap.milliseconds()["total"] / 1e3 for lap in laps]
    peak = torch.cuda.max_memory_allocated(ranks.device) / GIB if on_gpu else 0.0
    largest = torch.tensor([seconds, peak, *singles], dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = loss.detach().double().cpu()
    dist.all_reduce(total)
    values = largest.tolist()
    return Window(values[0], values[2:], values[1] if on_gpu else None, float(total))


def _wait(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


@dataclass(frozen=True)
class Failure:
    """Why a stack has no figures, in one line, and whether the run can go on without it."""

    line: str
    fatal: bool


T = TypeVar("T")


def attempt(work: Callable[[], T]) -> tuple[T | None, Failure | None]:
    """Do `work` on all ranks; its result, or the failure of the first rank that has one."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        text = " ".join(str(error).split())
        is_full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in text
        fatal = not is_full and any(sign in text for sign in UNUSABLE)
        failure = Failure(f"{type(error).__name__}: {text[:300]}", fatal)
        if not isinstance(error, ConfigError):
            print(f"rank {dist.get_rank()}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        # The frames hold the model, and with it the memory that the next stack needs.
        traceback.clear_frames(error.__traceback__)
    if failure and failure.fatal:
        return None, failure  # the others cannot be asked any more
    failures: list[Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    failure = next((f for f in failures if f), None)
    return (None if failure else result), failure


def run_stack(
    spec: Spec, config: Config, ranks: Ranks, batches: Sequence[Batch], warmup: int, steps: int
) -> tuple[Window | None, dict[str, str], Failure | None]:
    """Build, measure and free one stack: its figures, what it says of itself, and its failure."""
    before = _allocated_gib(ranks)
    built: list[Stack] = []

    def make() -> None:
        seed_everything(config, ranks)
        built.append(build(spec, config, ranks))
        seed_everything(config, ranks)

    window = None
    about: dict[str, str] = {}
    _, failure = attempt(make)
    if not failure:
        about = {"dispatch": built[0].dispatch, "description": built[0].description}
        window, failure = attempt(lambda: measure(built[0], batches, ranks, warmup, steps))
        if window and window.peak_gib is not None:
            window = replace(window, peak_gib=window.peak_gib - before)
        if not (failure and failure.fatal):
            # Only here has every rank built one, as closing needs.
            _, close_failure = attempt(lambda: built[0].close())
            failure = failure or close_failure
    if failure and failure.fatal:
        return window, about, failure
    built.clear()
    clear_aux_losses_tracker()
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        left = _allocated_gib(ranks) - before
        if left > LEFT_GIB:
            print(f"rank {ranks.rank}: {spec} leaves {left:.2f} GiB allocated", flush=True)
    return window, about, failure


def _allocated_gib(ranks: Ranks) -> float:
    return torch.cuda.memory_allocated(ranks.device) / GIB if ranks.device.type == "cuda" else 0.0


@dataclass
class Row:
    """One stack at one micro-batch, over the repeats."""

    spec: Spec
    config: Config
    world_size: int
    peak_flops: float | None = None
    about: dict[str, str] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    error: str | None = None

    def figures(self) -> results.Row:
        """The row of the results file. Units are in the names."""
        flags = list(self.spec.flags)
        row: results.Row = {
            "stack": self.spec.stack,
            "path": self.spec.path,
            "micro_batch": self.config.train.micro_batch,
            "global_batch": self.config.global_batch(self.world_size),
            "gpus": self.world_size,
        }
        for variant in VARIANTS:
            if variant in flags:
                row["operations"] = variant
                flags.remove(variant)
        if flags:
            row["flags"] = flags
        row |= self.about
        if self.error:
            row["error"] = self.error
        if not self.windows:
            return row
        tokens = row["global_batch"] * self.config.model.seq_len / self.world_size
        speeds = [tokens / w.step_seconds for w in self.windows]
        count = flops.count(self.config.model, self.config.moe).flops_per_token
        row["repeats"] = len(self.windows)
        row["step_ms"] = results.spread([w.step_seconds * 1e3 for w in self.windows])
        singles = [seconds * 1e3 for w in self.windows for seconds in w.single_seconds]
        row["single_step_ms"] = results.spread(singles)
        row["tokens_per_sec_per_gpu"] = results.spread(speeds)
        row["tflops_per_gpu"] = results.spread([s * count / 1e12 for s in speeds])
        if self.peak_flops:
            row["mfu"] = results.spread([s * count / self.peak_flops for s in speeds])
        peaks = [w.peak_gib for w in self.windows if w.peak_gib is not None]
        if peaks:
            row["peak_allocated_gib"] = results.spread(peaks)
        # Of the last repeat; null says that it was not a number.
        loss = self.windows[-1].final_loss
        row["final_loss"] = loss if math.isfinite(loss) else None
        return row


def rotated(specs: Sequence[Spec], repeat: int) -> list[Spec]:
    """The stacks in this repeat's order: each comes first, and last, in turn."""
    start = repeat % len(specs)
    return [*specs[start:], *specs[:start]]


def parse_stacks(paths: str, peers: str) -> list[Spec]:
    """`fp8_compact` or `fp8:experimental:fp8_param`, with commas between. Raises ConfigError."""
    specs = []
    having = {str(variant): paths for variant, paths in VARIANTS.items()}
    for stack, option, text, known, flags in (
        ("ours", "--paths", paths, PATH_NAMES, PATH_FLAGS),
        ("megatron-core", "--peers", peers, PEERS, PEER_FLAGS),
    ):
        for item in text.split(",") if text not in ("", "none") else []:
            path, *chosen = item.split(":")
            if path not in known:
                raise ConfigError(f"{option} {item}: known are {', '.join(known)}, or none")
            for flag in chosen:
                if flag not in flags or path not in having.get(flag, (path,)):
                    raise ConfigError(f"{option} {item}: {path} takes no {flag!r}")
            specs.append(Spec(stack, path, tuple(chosen)))
    if not specs:
        raise ConfigError("--paths none --peers none leaves nothing to measure")
    if len(set(specs)) < len(specs):
        raise ConfigError("a stack is named twice in --paths or --peers")
    return specs


def load_configs(
    arguments: argparse.Namespace, specs: Sequence[Spec], world_size: int
) -> dict[tuple[Spec, int], Config]:
    """The config of each stack at each micro-batch. Raises ConfigError."""
    configs = {}
    for micro_batch in arguments.micro_batches or [None]:
        for spec in specs:
            overrides = list(arguments.overrides)
            if micro_batch is not None:
                overrides.append(f"train.micro_batch={micro_batch}")
            overrides += [key for flag, key in FLAG_KEYS.items() if flag in spec.flags]
            # A peer has paths of its own; the rest of the config is for all.
            overrides.append(f"moe.path={spec.path if spec.stack == 'ours' else 'bf16'}")
            config = load(arguments.config, overrides)
            check_world(config, world_size)
            if config.data.document_mask:
                raise ConfigError("data.document_mask=true is not measured; leave it out")
            if spec.stack != "ours":
                if preflight.resolve_device(config) == "cpu":
                    raise ConfigError(
                        f"--peers {spec.path}: stock megatron-core trains on GPUs alone; "
                        "pass --peers none"
                    )
                if preflight.resolve_dtype(config, "cuda") != torch.bfloat16:
                    raise ConfigError(
                        "--peers: stock megatron-core is run in BF16; "
                        "leave train.dtype out or pass --peers none"
                    )
            configs[spec, config.train.micro_batch] = config
    return configs


class Report:
    """Rank 0: progress, the results file, and the table."""

    def __init__(self, path: Path, head: results.Result, rows: Sequence[Row]) -> None:
        self.path, self.head, self.rows = path, head, rows
        # Into a log file the table goes whole, whatever width a terminal would have.
        self.console = Console(width=None if sys.stdout.isatty() else 150)

    def progress(self, repeat: int, row: Row, failure: Failure | None) -> None:
        figures = row.figures()
        name = f"repeat {repeat + 1}  {row.spec}  micro-batch {row.config.train.micro_batch}"
        if failure:
            print(f"{name}: {failure.line}", flush=True)
        else:
            window = row.windows[-1]
            peak = "" if window.peak_gib is None else f", {window.peak_gib:.1f} GiB"
            print(
                f"{name}: {window.step_seconds * 1e3:.1f} ms/step{peak}, "
                f"loss {window.final_loss:.4f}, dispatch {figures['dispatch']}",
                flush=True,
            )

    def write(self) -> None:
        """All rows that have been tried so far."""
        tried = [row.figures() for row in self.rows if row.windows or row.error]
        results.write_json(self.path, {**self.head, "rows": tried})

    def table(self) -> None:
        table = Table(title=str(self.path))
        for name in ("stack", "path", "micro-batch", "ms/step", "from", "to", "tokens/s/GPU",
                     "TFLOP/s/GPU", "MFU", "peak GiB", "loss"):  # fmt: skip
            table.add_column(name, justify="left" if name in ("stack", "path") else "right")
        for row in self.rows:
            figures = row.figures()
            cells = [row.spec.stack, ":".join((row.spec.path, *row.spec.flags)),
                     str(row.config.train.micro_batch)]  # fmt: skip
            if "step_ms" not in figures:
                table.add_row(*cells, (row.error or "not run").partition(":")[0])
                continue
            ms = figures["step_ms"]
            mfu = figures.get("mfu", {}).get("median")
            peak = figures.get("peak_allocated_gib", {}).get("median")
            loss = figures["final_loss"]
            table.add_row(
                *cells,
                *(f"{ms[key]:.1f}" for key in ("median", "min", "max")),
                f"{figures['tokens_per_sec_per_gpu']['median']:,.0f}",
                f"{figures['tflops_per_gpu']['median']:.4g}",
                "" if mfu is None else f"{mfu:.1%}",
                "" if peak is None else f"{peak:.1f}",
                "not finite" if loss is None else f"{loss:.4f}",
            )
        self.console.print(table)


def bench(arguments: argparse.Namespace) -> int:
    """Measure everything. Raises ConfigError before any process group starts."""
    specs = parse_stacks(arguments.paths, arguments.peers)
    configs = load_configs(arguments, specs, world_size_from_env())
    first = next(iter(configs.values()))
    device = preflight.resolve_device(first)
    if first.train.deterministic:
        preflight.make_deterministic()
    ranks = parallel.start(
        device, first.parallel.expert_parallel, first.train.seed, first.parallel.timeout_s
    )
    machine = describe_machine(ranks.device, ranks.world_size)
    peak = peak_bf16_flops(torch.cuda.get_device_name(ranks.device)) if device == "cuda" else None
    rows = {key: Row(key[0], config, ranks.world_size, peak) for key, config in configs.items()}
    warmup, steps, repeats = arguments.warmup, arguments.steps, arguments.repeats
    report = None
    if ranks.is_first:
        head: results.Result = {
            **machine,
            "config": first.model_dump(mode="json"),
            "bench": {
                "warmup_steps": warmup,
                "steps": steps,
                "repeats": repeats,
                "flops_per_token": flops.count(first.model, first.moe).flops_per_token,
            },
            "rows": [],
        }
        path = arguments.out / f"train_{Path(arguments.config).stem}.json"
        report = Report(path, head, list(rows.values()))

    status = 0
    for micro_batch, repeat in itertools.product(
        dict.fromkeys(micro_batch for _, micro_batch in configs), range(repeats)
    ):
        for spec in rotated(specs, repeat):
            row = rows[spec, micro_batch]
            if status or row.error:
                continue  # once is enough
            batches = random_batches(row.config, ranks, warmup + steps)
            window, about, failure = run_stack(spec, row.config, ranks, batches, warmup, steps)
            row.about |= about
            if window:
                row.windows.append(window)
            if failure:
                row.error = failure.line
                status = 1 if failure.fatal else 0
            if report:
                report.progress(repeat, row, failure)
                report.write()
    if report:
        report.table()
    if not status:
        dist.barrier()
        parallel.stop()
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, such as configs/qwen3_30b_a3b_8l.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all stacks")
    parser.add_argument("--paths", default=",".join(PATH_NAMES), help="default: %(default)s")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    parser.add_argument("--micro-batches", type=_positive_list, metavar="N,N",
                        help="default: the config's")  # fmt: skip
    parser.add_argument("--steps", type=_positive, default=8, help="timed steps of a repeat")
    parser.add_argument("--warmup", type=_positive, default=4, help="steps before them")
    parser.add_argument("--repeats", type=_positive, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_intermixed_args(argv)
    try:
        return bench(arguments)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # torchrun ends all ranks with the first; rank 0 speaks for them
        return 2


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _positive_list(text: str) -> list[int]:
    return list(dict.fromkeys(_positive(part) for part in text.split(",")))


if __name__ == "__main__":
    run_process(main)
