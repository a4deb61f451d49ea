"""Where a GPU's time goes in a training step, by kind of kernel, from Chrome traces.

    torchrun --nproc-per-node 2 -m train CONFIG train.trace_step=20 run.name=A    # records one
    python -m scripts.bench.trace bf16=runs/A/trace.json.gz [PATH=TRACE ...] [--out FILE.json]
        [--machine "2 x NVIDIA H200"] [--commit HASH]

A trace is what torch.profiler exports, also compressed as .json.gz. A kernel is of the first kind
whose pattern matches its name. `idle` is the time between the first and the last kernel in which
none ran; kernels of different streams can run at the same time, so kinds and `idle` may add up to
more than `span`. One step of one rank, with the profiler's own cost in the gaps: it shows shares,
and cannot compare speeds.
"""

import argparse
import gzip
import json
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from scripts import terminal
from scripts.bench.results import write_json


class Event(TypedDict, total=False):
    """One event of a Chrome trace, as far as it is read here."""

    ph: str
    """`X` for one that lasts."""
    cat: str
    """Category: `kernel`, `cpu_op`, `cuda_runtime`, `user_annotation`, ..."""
    name: str
    ts: float
    """When it began, microseconds."""
    dur: float
    """How long it took, microseconds."""
    args: dict[str, Any]


KINDS = {
    "optimizer, gradient norm": r"multi_tensor_apply|FusedOptimizer|adamw",
    "attention": r"sdpa|fmha|cudnn::fusion",
    # The last letters say how cuBLAS reads its operands; a wgrad's are NT.
    "expert weight gradients": r"grouped_mm_wgrad|grouped_gemm_wgrad|ptrGroup_NT",
    "expert GEMMs": r"_grouped_gemm_kernel|sm90_fp8_gemm|GemmUniversal|_qqtst_|ptrGroup",
    "dense GEMMs": r"nvjet|cutlass|sm90_xmma|gemm",
    "dispatch and combine": r"deep_ep|arrivals|_expand_",
    "FSDP's communication": r"nccl",
    "SwiGLU": r"swiglu",
    "quantize, dequantize": r"quantize|block_scaled",
    "permute, unpermute": r"permute|_place_kernel|_count_kernel|_scan_kernel",
    "norms, positions": r"rmsnorm|rope|layernorm",
}
"""Patterns of kernels' names by kind, the first that matches; everything else is `other`."""


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, part in KINDS.items() if re.search(part, kernel)), "other")


def summarize(events: Sequence[Event]) -> dict[str, float]:
    """Milliseconds by kind, and `idle` and `span`. Raises ValueError without a kernel."""
    kernels = [
        event
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    if not kernels:
        raise ValueError("the trace has no kernel of a GPU")
    total = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in kernels:
        total[kind_of(event["name"])] += event["dur"] / 1e3
    busy, until = 0.0, 0.0
    for event in sorted(kernels, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        busy += max(0.0, end - max(event["ts"], until))
        until = max(until, end)
    span = until - min(event["ts"] for event in kernels)
    return {**total, "idle": (span - busy) / 1e3, "span": span / 1e3}


def read(path: Path) -> list[Event]:
    """The events of a trace. Raises OSError or ValueError."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        found = json.load(file)
    if not isinstance(found, dict) or not isinstance(found.get("traceEvents"), list):
        raise ValueError("not a trace: it has no list of traceEvents")
    return found["traceEvents"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, reported in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("traces", nargs="+", metavar="PATH=TRACE")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--machine", default="not known")
    parser.add_argument("--commit", default="not known")
    args = parser.parse_args(arguments)
    rows = []
    for item in args.traces:
        path, _, name = item.partition("=")
        try:
            if not name:
                raise ValueError("no name for this trace")
            sums = summarize(read(Path(name)))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
            print(f"{item}: {error or type(error).__name__}; give PATH=TRACE", file=sys.stderr)
            return 2
        rows.append({"traced": path, "ms": sums})
        print(path, *(f"{kind} {ms:.1f}" for kind, ms in sums.items()), sep="\n  ")
    if args.out:
        try:
            write_json(args.out, {"machine": args.machine, "commit": args.commit, "rows": rows})
        except OSError as error:
            print(f"--out {args.out} cannot be written: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    terminal.run(main)
