"""What a path's layouts cost a training step, to a tenth of a percent: two paths on one model.

    torchrun --nproc-per-node 2 -m scripts.bench.pairs configs/qwen3_30b_a3b_8l.yaml \\
        [--pairs A,B ...] [--blocks 40] [--out docs/results/pairs.json] [key=value ...]

Two paths of one `Linear` alternate step by step in one process, in blocks of A B B A, so that a
drift of clocks or temperature affects both and cancels; weights, memory, batches and dispatcher are
the same. A block gives one difference; the mean of all and its 95% interval are printed, in
milliseconds and percent of A's step. By default `fp8_compact` is compared with the baseline, from
which it differs in layout and in who quantizes and permutes; and against the baseline with the
same kernels (`:triton`), from which it differs in layout alone.

Paths that compute in different precisions cannot be paired: each would run at the clocks and
temperature that the other leaves.
"""

import argparse
import gc
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist

from models.fp8 import operations
from models.fp8.operations import VARIANTS
from models.moe.paths import PATHS
from models.moe.runtime import Runtime
from scripts.bench import results
from scripts.bench.command import or_one_line, positive, prepare, start
from scripts.bench.machine import describe_machine
from scripts.bench.measure.window import without_collector
from scripts.bench.stacks import inputs
from scripts.bench.stacks.ours import Ours, use_runtime
from scripts.bench.stacks.spec import Spec, config_of, parse_all
from train import parallel
from train.config import Config, ConfigError
from train.data.batches import Batch
from train.failure import run_process
from train.metrics.throughput import GIB
from train.parallel import Ranks
from train.profiling.timer import Timer
from train.whole_file import check_out

ORDER = (0, 1, 1, 0)
"""The order in a block: on average both paths are equally far from its start."""
DEFAULT_PAIRS = [f"fp8_baseline{flag},fp8_compact" for flag in ("", ":triton")]


class PairRow(TypedDict, total=False):
    """One pair on one shape. Lists of two have the first path's figure and the second's."""

    pair: list[str]
    """Names of the two stacks; the second is compared with the first."""
    config: str
    """Name of the YAML file; the next five are of the model."""
    hidden: int
    layers: int
    experts: int
    top_k: int
    ffn: int
    tokens_per_gpu: int
    gpus: int
    dispatch: str
    blocks: int
    """Blocks of four steps, `ORDER`."""
    step_ms: list[float]
    """Means over all blocks, on the slowest rank."""
    saved_ms: results.Interval
    """First minus second, a block each."""
    saved_percent: results.Interval
    """Of the first path's mean step."""
    saved_ms_median: float
    relayouts_a_layer: list[float]
    """Relayouts of scales in a layer's forward and backward pass."""
    peak_allocated_gib: list[float]
    """On the rank with the most; absent on a CPU."""


def parse_pair(text: str) -> tuple[Spec, Spec]:
    """Two of our paths with a comma between. Raises ConfigError."""
    specs = parse_all(text)
    if len(specs) != 2 or any(spec.stack != "ours" for spec in specs):
        raise ConfigError(f"--pairs {text}: needs two of our paths, such as {DEFAULT_PAIRS[0]}")
    first, second = specs
    for spec in specs:
        if set(spec.flags) - set(VARIANTS):
            raise ConfigError(f"--pairs {text}: only {', '.join(VARIANTS)} can alternate")
    if PATHS[first.path].LINEAR is not PATHS[second.path].LINEAR:  # type: ignore[index]
        raise ConfigError(f"--pairs {text}: their GEMMs differ; measure them with bench.train")
    return first, second


def runtime_of(spec: Spec, of: Runtime, device: str) -> Runtime:
    """The runtime of a path that shares everything else with another's."""
    path = PATHS[spec.path]  # type: ignore[index]
    variant = next((variant for variant in VARIANTS if variant in spec.flags), None)
    chosen = operations.choose(spec.path, device, variant)  # type: ignore[arg-type]
    return replace(of, path=path).with_operations(chosen.operations, device)


class Pair:
    """One model that trains by either of two paths."""

    def __init__(self, stack: Ours, pair: tuple[Spec, Spec], batches: Sequence[Batch]) -> None:
        device = stack.ranks.device.type
        self.stack, self.pair = stack, pair
        self.runtimes = [runtime_of(spec, stack.model.runtime, device) for spec in pair]
        self.queue: Iterator[Batch] = itertools.cycle(batches)

    def step(self, which: int) -> None:
        """One step by path 0 or 1, on the same tokens and with the same routing every time."""
        use_runtime(self.stack.model, self.runtimes[which])
        inputs.seed_everything(self.stack.config, self.stack.ranks)  # forced routing is drawn
        self.stack.step(self.queue)

    def times(self, blocks: int) -> torch.Tensor:
        """Milliseconds of each step, [blocks, 4], on the slowest rank."""
        timer, laps = Timer(self.stack.ranks.device), []
        with without_collector():
            for which in ORDER * blocks:
                timer.start()
                self.step(which)
                laps.append(timer.stop())
        found = torch.tensor([lap.milliseconds()["total"] for lap in laps], dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.view(blocks, len(ORDER))

    def peaks(self) -> list[float] | None:
        """Peak GiB of tensors, by path, on the rank with the most; None on a CPU."""
        device = self.stack.ranks.device
        if device.type != "cuda":
            return None
        found = torch.zeros(2, dtype=torch.float64)
        for which in (0, 1):
            self.step(which)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            for _ in range(2):
                self.step(which)
            torch.cuda.synchronize(device)
            found[which] = torch.cuda.max_memory_allocated(device) / GIB
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def relayouts(self, which: int) -> float:
        """Relayouts of scales in a layer's forward and backward pass."""
        counts = self.stack.model.runtime.counts
        counts.reset()
        self.step(which)
        metrics = counts.metrics()
        return metrics["moe/scale_relayouts"] + metrics["moe/scale_relayouts_backward"]


def differences(times: torch.Tensor) -> PairRow:
    """How much less the second path takes than the first, from milliseconds [blocks, 4] in
    `ORDER`."""
    first = (times[:, 0] + times[:, 3]) / 2
    second = (times[:, 1] + times[:, 2]) / 2
    saved, mean = first - second, float(first.mean())
    return {
        "step_ms": [mean, float(second.mean())],
        "saved_ms": results.interval(saved.tolist()),
        "saved_percent": results.interval((saved / mean * 100).tolist()),
        "saved_ms_median": float(saved.median()),
    }


def measure(
    config: Config, ranks: Ranks, pair: tuple[Spec, Spec], blocks: int, warmup: int
) -> PairRow:
    """Measure one pair, on a model of its own. All ranks together."""
    inputs.seed_everything(config, ranks)
    stack = Ours(config, ranks)
    found = Pair(stack, pair, inputs.batches(config, ranks, "balanced", 1))
    for _ in range(warmup):
        found.step(0)
        found.step(1)
    row: PairRow = {
        "pair": [str(spec) for spec in pair],
        "hidden": config.model.hidden_size,
        "layers": config.model.num_layers,
        "experts": config.moe.num_experts,
        "top_k": config.moe.top_k,
        "ffn": config.moe.ffn_hidden_size,
        "tokens_per_gpu": config.train.micro_batch * config.model.seq_len,
        "gpus": ranks.world_size,
        "dispatch": stack.dispatch,
        "blocks": blocks,
        **differences(found.times(blocks)),
        "relayouts_a_layer": [found.relayouts(which) for which in (0, 1)],
    }
    if peaks := found.peaks():
        row["peak_allocated_gib"] = peaks
    stack.close()
    return row


def say(row: PairRow) -> str:
    """A row for the terminal."""
    saved, percent = row["saved_ms"], row["saved_percent"]
    text = (
        f"{row['pair'][1]} against {row['pair'][0]}, hidden {row['hidden']}, "
        f"{row['tokens_per_gpu']:,} tokens a GPU: {row['step_ms'][0]:.2f} ms a step, saves "
        f"{saved['mean']:.3f} ± {saved['plus_minus']:.3f} ms, "
        f"{percent['mean']:.2f} ± {percent['plus_minus']:.2f}%"
    )
    if peaks := row.get("peak_allocated_gib"):
        text += f"; peak {peaks[0]:.2f} and {peaks[1]:.2f} GiB"
    return text


def run(arguments: argparse.Namespace) -> int:
    """Measure every pair. Raises ConfigError before any process group starts."""
    check_out(arguments.out)
    pairs = [parse_pair(text) for text in arguments.pairs]
    configs = [
        config_of(first, arguments.config, arguments.overrides, "balanced", arguments.micro_batch)
        for first, _ in pairs
    ]
    prepare(configs)
    ranks = start(configs[0])
    origin = describe_machine(ranks.device, ranks.world_size)
    for pair, config in zip(pairs, configs, strict=True):
        row: PairRow = {
            "config": Path(arguments.config).stem,
            **measure(config, ranks, pair, arguments.blocks, arguments.warmup),
        }
        gc.collect()
        if ranks.is_first:
            print(say(row), flush=True)
            if arguments.out:
                add(arguments.out, {**origin, "rows": []}, row)
    dist.barrier()
    parallel.stop()
    return 0


def add(path: Path, fresh: dict, row: PairRow) -> None:
    """Add the row to the file, or replace one of the same pair and shape from the same commit and
    machine; a file of another commit or machine is replaced, since rows are compared with each
    other."""
    content = fresh
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(found.get(name) == fresh[name] for name in ("machine", "versions", "commit")):
            content = found
    key = ("pair", "config", "hidden", "tokens_per_gpu", "gpus")
    others = [r for r in content["rows"] if any(r[name] != row.get(name) for name in key)]
    results.write_json(path, {**content, "rows": [*others, row]})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, such as configs/qwen3_30b_a3b_8l.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--pairs", nargs="+", default=DEFAULT_PAIRS, metavar="A,B")
    parser.add_argument("--micro-batch", type=positive, help="default: the config's")
    parser.add_argument("--blocks", type=positive, default=40, help="blocks of four steps")
    parser.add_argument(
        "--warmup", type=positive, default=4, help="untimed steps of each path before"
    )
    parser.add_argument("--out", type=Path, help="add the figures to this JSON file")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.blocks < 2:
        parser.error("--blocks must be at least 2: an interval comes from their differences")
    return or_one_line(lambda: run(arguments))


if __name__ == "__main__":
    run_process(main)
