"""What the Triton kernels cost: microseconds, GB/s next to a copy's, TFLOP/s next to cuBLAS's.

    python -m scripts.bench.kernels [--out docs/results/kernels.json] [--only TEXT] [--tune]

Needs a Hopper GPU. The times are the GPU's alone: a long kernel keeps the GPU busy while the host
queues the calls, so nothing waits for Python between them. Each call works on other buffers than
those before it, more than fit in L2 together, as in training; median, least and most of 20 calls
are reported (scripts/bench/kernels/timing.py). In the same run a copy is measured for each size of
memory-bound kernels, and a dense GEMM with the same number of operations for each GEMM.

TransformerEngine's kernels are measured too where it is installed (`models/fp8/te.py`). Its linear
layer launches several kernels for each expert, more than can be queued ahead: there the host's time
counts too, as in training. So are DeepGEMM's grouped GEMMs (github.com/deepseek-ai/DeepGEMM), with
scales in its layout and with COMPACT ones, which it transposes first.
`--tune` tries settings of the FP8 grouped GEMM, and writes nothing.
"""

import argparse
import sys
from pathlib import Path

import torch

from scripts.bench.command import or_one_line
from scripts.bench.kernels.gemms import GEMMS, bench_gemms, tune
from scripts.bench.kernels.memory_bound import bench_memory_bound
from scripts.bench.kernels.peers import find_peers
from scripts.bench.kernels.timing import CALLS, ROTATED_BYTES, Bench
from scripts.bench.kernels.weights import bench_optimizer, bench_weights
from scripts.bench.machine import describe_machine
from scripts.bench.results import write_json
from train.whole_file import check_out

SIZES = [(16384, 2048), (65536, 2048), (16384, 7168)]
"""Rows and columns of what the memory-bound kernels read."""
UP_PROJECTION = (64, 1536, 2048)
"""Experts, N and K: Qwen3-30B-A3B's, of the 64 experts of one GPU of two."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--only", default="", help="only kernels whose line has this text")
    parser.add_argument("--tune", action="store_true", help="try settings of the FP8 GEMM")
    args = parser.parse_args()
    return or_one_line(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measure every kernel. Raises ConfigError."""
    check_out(args.out)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        print("needs a GPU of compute capability 9.0 or newer", file=sys.stderr)
        return 1
    from models.fp8 import kernels as ops

    torch.manual_seed(0)
    if args.tune:
        tune(ops)
        return 0
    peers = find_peers()
    bench = Bench(args.only)
    for rows, cols in SIZES:
        bench_memory_bound(bench, ops, peers.te, rows, cols)
    for experts, rows, k, n in GEMMS:
        bench_weights(bench, ops, experts, n, k)
        bench_gemms(bench, ops, peers, experts, rows, k, n)
    bench_optimizer(bench, ops, *UP_PROJECTION)
    if args.out:
        config = {
            "calls": CALLS,
            "rotated_mib": ROTATED_BYTES // 2**20,
            "plan": "8 slots a token, 2 of them local on average, 32 experts",
        }
        origin = describe_machine(torch.device("cuda", 0))
        write_json(args.out, {**origin, "config": config, "rows": bench.rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
