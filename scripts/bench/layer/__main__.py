"""One MoE layer, forward and backward, in all paths: where relayouts matter, and where they do not.

    python -m scripts.bench.layer [--shapes NAME ...] [--paths PATH ...] [--tokens N]
        [--repeats R] [--out docs/results/moe_layer.json]
    torchrun --nproc-per-node 4 -m scripts.bench.layer ...      # experts spread over 4 GPUs
    python -m scripts.bench.layer --plot docs/results/moe_layer.json    # the picture alone

The layer is `Experts` alone (scripts/bench/layer/setup.py), with even routing and without router,
FSDP or optimizer. Weights and activations are BF16. Paths alternate: a round is, for each path, one
call that is not timed, a few that are, and one more with timers between its parts. Times are CUDA
events around forward and around backward, so they include the host's work where the GPU waits for
it. With several GPUs they are rank 0's. At expert parallelism 1, dispatch and combine only copy.

Written for each shape and path: milliseconds, TFLOP/s (2 forward and 4 backward for each token and
weight that it meets), peak memory, relayouts, kernels launched, the time of each part, and whether
the relayouts counted are those that a profile shows (scripts/bench/layer/profile.py).
"""

import argparse
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from models.config import PATH_NAMES, PathName
from models.moe.runtime import Runtime
from scripts.bench.command import or_one_line
from scripts.bench.layer.profile import PASSES, profile_layer
from scripts.bench.layer.setup import SHAPES, Layer, Shape, fit
from scripts.bench.machine import describe_machine
from scripts.bench.results import Row, spread, write_json
from train import parallel
from train.config import ConfigError
from train.profiling.moe import timed_runtime
from train.profiling.timer import Lap, Timer
from train.whole_file import check_out

DEFAULT_SHAPES = ["qwen3_30b_a3b", "deepseek_v2_lite", "mixtral_8x7b", "deepseek_v3"]
CALLS = 3
"""Timed calls of a path in each round."""


class Measurements:
    """What the rounds of one shape and path have given so far."""

    def __init__(self, layer: Layer, runtime: Runtime) -> None:
        self.layer = layer
        self.runtime = runtime
        self.timer = Timer(layer.device)
        self.timed = timed_runtime(runtime, self.timer)
        self.laps: list[tuple[Lap, Lap]] = []
        self.parts: list[tuple[Lap, Lap]] = []
        self.peaks: list[int] = []

    def round(self) -> None:
        """A call to warm up, `CALLS` that are timed, one with its parts timed."""
        device = self.layer.device
        _call(self.layer, self.runtime, self.timer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.laps += [_call(self.layer, self.runtime, self.timer) for _ in range(CALLS)]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.peaks.append(torch.cuda.max_memory_allocated(device))
        self.parts.append(_call(self.layer, self.timed, self.timer))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def row(self) -> Row:
        times = [
            [lap.milliseconds()["total"] for lap in laps] for laps in zip(*self.laps, strict=True)
        ]
        both = [sum(pair) for pair in zip(*times, strict=True)]
        row: Row = {
            "forward_ms": spread(times[0]),
            "backward_ms": spread(times[1]),
            "tflops_per_gpu": spread([self.layer.flops / ms / 1e9 for ms in both]),
        }
        if self.peaks:
            row["peak_allocated_gib"] = spread([peak / 2**30 for peak in self.peaks])
        for name, laps in zip(PASSES, zip(*self.parts, strict=True), strict=True):
            calls = [lap.milliseconds() for lap in laps]
            row[f"{name}_parts_ms"] = {
                part: spread([call[part] for call in calls]) for part in calls[0]
            }
        return row


def _call(layer: Layer, runtime: Runtime, timer: Timer) -> tuple[Lap, Lap]:
    """Forward and backward, each a lap of the timer."""
    timer.start()
    output = layer.forward(runtime)
    forward = timer.stop()
    timer.start()
    layer.backward(output)
    return forward, timer.stop()


def bench(
    name: str, paths: list[PathName], tokens: int, repeats: int, dispatch: str, device: torch.device
) -> list[Row]:
    """Rows of one shape, a path each."""
    ranks = dist.get_world_size()
    whole: Shape = SHAPES[name]
    shape, tokens = fit(whole, tokens, ranks, _free_memory(device))
    layer = Layer(shape, tokens, device, dispatch)
    measured = {path: Measurements(layer, layer.runtime(path)) for path in paths}
    for measurements in measured.values():  # kernels are compiled and memory is allocated
        _call(layer, measurements.runtime, measurements.timer)
    for _ in range(repeats):
        for measurements in measured.values():
            measurements.round()
    rows = []
    for path, measurements in measured.items():
        row = {
            "shape": name,
            "path": path,
            "hidden": shape.hidden,
            "ffn": shape.ffn,
            "experts": shape.experts,
            "experts_of_the_model": whole.experts,
            "top_k": shape.top_k,
            "tokens_per_gpu": tokens,
            "rows_per_expert": tokens * ranks * shape.top_k // shape.experts,
            "gpus": ranks,
            "runs_on": measurements.runtime.description,
            **measurements.row(),
            "profile": profile_layer(layer, measurements.runtime),
        }
        rows.append(row)
        measurements.runtime.dispatcher.close()
    return rows


def _free_memory(device: torch.device) -> int | None:
    """Free bytes on the rank's GPU with the fewest, so that all ranks choose the same shape."""
    if device.type != "cuda":
        return None
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    dist.all_reduce(free, dist.ReduceOp.MIN)
    return int(free)


def line(row: Row) -> str:
    """A row for the terminal."""
    times = "  ".join(f"{name} {row[f'{name}_ms']['median']:8.2f} ms" for name in PASSES)
    peak = row.get("peak_allocated_gib")
    counts = [row["profile"][name] for name in PASSES]
    relayouts = "+".join(str(c["relayouts"]["counted"]) for c in counts)
    text = f"{row['shape']:16} {row['path']:12} {times}  relayouts {relayouts}"
    if peak:
        text += f"  {row['tflops_per_gpu']['median']:5.0f} TFLOP/s  {peak['median']:6.1f} GiB"
    if "kernels" in counts[0]:
        agree = all(c["relayouts"]["agree"] for c in counts)
        text += f"  kernels {'+'.join(str(c['kernels']) for c in counts)}"
        text += "  profile agrees" if agree else "  PROFILE DISAGREES"
    return text


def run(args: argparse.Namespace) -> int:
    """Measure every shape, on the GPUs of all ranks or on a CPU. Raises ConfigError."""
    check_out(args.out)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here; leave --device out")
    on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = parallel.start("cuda" if on_gpu else "cpu", world_size, seed=0, timeout_s=600)
    config = {
        "tokens_per_gpu": args.tokens,
        "repeats": args.repeats,
        "calls": CALLS,
        "dispatch": args.dispatch,
        "routing": "even",
        "dtype": "bfloat16" if on_gpu else "float32",
    }
    rows: list[Row] = []
    for name in args.shapes:
        try:
            found = bench(name, args.paths, args.tokens, args.repeats, args.dispatch, ranks.device)
        except (RuntimeError, ValueError) as error:
            if world_size > 1:
                raise  # the other ranks would wait for this one
            text = str(error).strip().partition("\n")[0][:200]
            print(f"{name:16} failed: {type(error).__name__}: {text}", flush=True)
            rows.append({"shape": name, "error": text})
            continue
        finally:
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
        rows += found
        if ranks.is_first:
            print(*map(line, found), sep="\n", flush=True)
            if args.out:  # after every shape, so that a crash keeps what was measured
                origin = describe_machine(ranks.device, world_size)
                write_json(args.out, {**origin, "config": config, "rows": rows})
    dist.barrier()
    parallel.stop()
    return 1 if any("error" in row for row in rows) else 0


def draw(source: Path, picture: Path) -> int:
    """The picture alone. Raises ConfigError."""
    from scripts.bench.plots import plot

    try:
        plot(source, picture)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--plot {source}: no picture of one layer's figures: {error}") from None
    print(picture)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.layer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=DEFAULT_SHAPES)
    parser.add_argument("--paths", nargs="+", choices=PATH_NAMES, default=list(PATH_NAMES))
    parser.add_argument(
        "--tokens", type=int, default=16384, help="tokens of each GPU (default 16384)"
    )
    parser.add_argument("--repeats", type=int, default=10, help="rounds of all paths (default 10)")
    dispatchers = ("all_to_all", "deep_ep", "deep_ep_v1", "deep_ep_v2")
    parser.add_argument("--dispatch", choices=dispatchers, default="all_to_all")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw this JSON file's picture, measure nothing")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/moe_layer.svg"))
    args = parser.parse_args(argv)
    if args.plot:
        return or_one_line(lambda: draw(args.plot, args.picture))
    if args.repeats < 1 or args.tokens < 1:
        parser.error("--repeats and --tokens must be at least 1")
    return or_one_line(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
