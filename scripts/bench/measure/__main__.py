"""One stack's training speed, in processes of its own; `scripts.bench.train` starts it for each.

    torchrun --nproc-per-node 2 -m scripts.bench.measure configs/qwen3_30b_a3b_8l.yaml \\
        fp8_direct:prepare --micro-batches 4,8 --routing balanced --out one.json \\
        [--trace one.json.gz] [key=value ...]

For each micro-batch it builds the stack, warms it up, times a window of steps, and frees it. The
window is wall time from a barrier to the end of the last step's work on the slowest rank. Nothing
waits for the GPU between steps, since training does not; single steps are timed by events on the
GPU. Peak memory is the window's, on the rank with the most; energy is NVML's, of all GPUs together.

The variables that a stack's flags ask for, such as stock megatron-core's `cutlass`, are set by
scripts.bench.train (`Spec.environment`): started by hand, this has the shell's, and says on a GPU
which it lacks.

Writes one JSON object: where it ran, and a result a micro-batch. One that fails has an `error`, and
the next is tried, except for an error that leaves the GPU or NCCL unusable. A rank that fails alone
cannot tell the others, which wait for it: scripts.bench.train reads why in the file of `--failure`
(scripts/bench/measure/first_failure.py).
"""

import argparse
import gc
import itertools
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.profiler import profile

from scripts.bench import results, stacks
from scripts.bench.command import or_one_line, positive, positive_list, prepare, start
from scripts.bench.machine import describe_machine
from scripts.bench.measure import first_failure, waiting
from scripts.bench.measure.window import WARMUP, Window, measure, wait
from scripts.bench.stacks import Stack, inputs
from scripts.bench.stacks.spec import ROUTINGS, Spec, config_of, parse
from train import parallel
from train.config import Config, ConfigError
from train.data.batches import Batch
from train.failure import run_process
from train.metrics import auxiliary
from train.metrics.throughput import GIB
from train.parallel import Ranks
from train.whole_file import check_out

UNUSABLE = ("CUDA error", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
"""Texts of errors after which neither this rank nor its peers can continue."""
LEFT_GIB = 0.5
"""Memory that libraries may keep on the GPU after a stack is freed: workspaces of GEMMs and the
like."""


@dataclass(frozen=True)
class Failure:
    """Why a stack has no figures, in one line, and whether the run can continue without it."""

    line: str
    fatal: bool


def run(arguments: argparse.Namespace) -> int:
    """`measure_all`; an error that ends this rank is in the file of `--failure` at once."""
    try:
        return measure_all(arguments)
    except Exception as error:
        first_failure.tell(arguments.failure, line_of(error))
        raise


def measure_all(arguments: argparse.Namespace) -> int:
    """Measure every micro-batch. Raises ConfigError: about the data, or before any process group
    starts."""
    check_out(arguments.out)
    spec = parse(arguments.stack)
    configs = [
        config_of(spec, arguments.config, arguments.overrides, arguments.routing, size)
        for size in arguments.micro_batches or [None]
    ]
    prepare(configs)
    if arguments.wait_for:
        _load_libraries(spec)
        waiting.say_loaded(arguments.wait_for.parent)
        waiting.wait_for(arguments.wait_for)
    ranks = start(configs[0])
    if ranks.is_first and ranks.device.type == "cuda":
        say_unset(spec)
    report: dict[str, Any] = {
        **describe_machine(ranks.device, ranks.world_size),
        "gpus": ranks.world_size,
        "results": [],
    }
    fatal = False
    for config in configs:
        found, fatal = measure_config(spec, config, ranks, arguments)
        report["results"].append(found)
        if ranks.is_first:
            say(spec, found)
            results.write_json(arguments.out, report)
        if fatal:
            break
    if not fatal:
        dist.barrier()
        parallel.stop()
    return 1 if fatal else 0


def say_unset(spec: Spec) -> None:
    """Say which variables would have been set by scripts.bench.train."""
    if unset := " ".join(f"{name}={value}" for name, value in spec.unset.items()):
        print(
            f"{spec} is measured without {unset}, which scripts.bench.train sets", file=sys.stderr
        )


def _load_libraries(spec: Spec) -> None:
    """What building the stack would import; it takes seconds, and no GPU."""
    if torch.cuda.is_available():
        with suppress(ImportError):
            import transformer_engine.pytorch  # noqa: F401
    if spec.stack != "ours":
        from scripts.bench.stacks import stock_megatron  # noqa: F401


def measure_config(
    spec: Spec, config: Config, ranks: Ranks, arguments: argparse.Namespace
) -> tuple[dict[str, Any], bool]:
    """The result at one micro-batch, for JSON; and whether the run cannot continue after it."""
    steps = arguments.warmup + arguments.steps
    batches = inputs.batches(config, ranks, arguments.routing, steps)
    window, about, failure = run_stack(spec, config, ranks, batches, arguments)
    found: dict[str, Any] = {
        "micro_batch": config.train.micro_batch,
        "global_batch": config.global_batch(ranks.world_size),
        "expert_parallel": config.parallel.expert_parallel,
        "warmup_steps": arguments.warmup,
        **about,
    }
    if window:
        found |= window.figures()
    if failure:
        found["error"] = failure.line
    return found, failure is not None and failure.fatal


def run_stack(
    spec: Spec,
    config: Config,
    ranks: Ranks,
    batches: Sequence[Batch],
    arguments: argparse.Namespace,
) -> tuple[Window | None, dict[str, str], Failure | None]:
    """Build, measure and free one stack: its figures, its description, and its failure."""
    before = _allocated_gib(ranks)
    warmup, steps, trace = arguments.warmup, arguments.steps, arguments.trace
    quiet = arguments.quiet and partial(waiting.wait_for, arguments.quiet)
    together = partial(attempt, failure_file=arguments.failure)
    if ranks.device.type == "cuda":  # room for rows follows from the peak of this stack's steps
        torch.cuda.reset_peak_memory_stats(ranks.device)
    built: list[Stack] = []

    def make() -> None:
        inputs.seed_everything(config, ranks)
        built.append(stacks.build(spec, config, ranks))
        inputs.seed_everything(config, ranks)

    window = None
    about: dict[str, str] = {}
    _, failure = together(make)
    if not failure:
        about = {"dispatch": built[0].dispatch, "description": built[0].description}
        window, failure = together(lambda: measure(built[0], batches, ranks, warmup, steps, quiet))
        if trace and not failure:
            _, failure = together(lambda: record(built[0], batches, ranks, trace))
        if not (failure and failure.fatal):
            # Only here has every rank built one, as closing needs.
            _, close_failure = together(lambda: built[0].close())
            failure = failure or close_failure
    if failure and failure.fatal:
        return window, about, failure
    built.clear()
    auxiliary.clear()
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        left = _allocated_gib(ranks) - before
        if left > LEFT_GIB:
            print(f"rank {ranks.rank}: {spec} leaves {left:.2f} GiB allocated", flush=True)
    return window, about, failure


T = TypeVar("T")


def attempt(work: Callable[[], T], failure_file: Path | None) -> tuple[T | None, Failure | None]:
    """Do `work` on all ranks; returns its result, or the failure of the first rank that has one.

    failure_file: that of `--failure`, which is there while the others do not know of a failure.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        text = str(error)
        is_full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in text
        fatal = not is_full and any(sign in text for sign in UNUSABLE)
        failure = Failure(first_failure.tell(failure_file, line_of(error)), fatal)
        if not isinstance(error, ConfigError):
            print(f"rank {dist.get_rank()}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        # The frames hold the model, and with it the memory that the next stack needs.
        traceback.clear_frames(error.__traceback__)
    if failure and failure.fatal:
        return None, failure  # the others cannot be reached any more
    failures: list[Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    failure = next((f for f in failures if f), None)
    if failure and failure_file:
        failure_file.unlink(missing_ok=True)
        dist.barrier()  # none fails again before all have done so
    return (None if failure else result), failure


def line_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def record(stack: Stack, batches: Sequence[Batch], ranks: Ranks, path: Path) -> None:
    """Trace one step of every rank, and write the first one's. All ranks call it."""
    with profile() as recorded:
        stack.step(itertools.cycle(batches))
        wait(ranks)
    if ranks.is_first:
        recorded.export_chrome_trace(str(path))


def _allocated_gib(ranks: Ranks) -> float:
    return torch.cuda.memory_allocated(ranks.device) / GIB if ranks.device.type == "cuda" else 0.0


def say(spec: Spec, found: dict[str, Any]) -> None:
    """A result for the terminal."""
    name = f"{spec}  micro-batch {found['micro_batch']}"
    if "error" in found:
        print(f"{name}: {found['error']}", flush=True)
    else:
        peak = found["peak_allocated_gib"]
        memory = "" if peak is None else f", {peak:.1f} GiB"
        loss = found["final_loss"]
        print(
            f"{name}: {found['step_ms']:.1f} ms/step{memory}, loss "
            f"{'not finite' if loss is None else f'{loss:.4f}'}, dispatch {found['dispatch']}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, such as configs/qwen3_30b_a3b_8l.yaml")
    parser.add_argument("stack", help="a stack, such as bf16, fp8_direct:prepare, stock:bf16")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--micro-batches", type=positive_list, metavar="N,N",
                        help="default: the config's")  # fmt: skip
    parser.add_argument("--routing", choices=ROUTINGS, default="balanced")
    parser.add_argument("--steps", type=positive, default=20, help="timed steps")
    parser.add_argument("--warmup", type=positive, default=WARMUP, help="untimed steps before")
    parser.add_argument("--trace", type=Path, metavar="FILE.json.gz",
                        help="record one more step, for scripts.bench.trace")  # fmt: skip
    parser.add_argument("--wait-for", type=Path, metavar="FILE",
                        help="leave the GPUs alone until it is there")  # fmt: skip
    parser.add_argument("--quiet", type=Path, metavar="FILE",
                        help="run no step but the first until it is there")  # fmt: skip
    parser.add_argument("--failure", type=Path, metavar="FILE",
                        help="where a rank that fails alone says why, at once")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_intermixed_args(argv)
    return or_one_line(lambda: run(arguments))


if __name__ == "__main__":
    run_process(main)
