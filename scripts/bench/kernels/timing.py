"""The GPU's time for one call of a kernel, and what that is next to a copy or a dense GEMM.

The times are the GPU's alone: a long kernel keeps the GPU busy while the host queues the calls, so
nothing waits for Python between them. Each call works on other buffers than those before it, more
than fit in L2 together, as in training.
"""

import statistics
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

import torch

from scripts.bench.results import Spread, spread

CALLS = 20
ROTATED_BYTES = 256 * 2**20
"""Total size of the rotated inputs, at least: several times an L2 of 50 MB."""
BUSY_CYCLES = 20_000_000
"""About 10 ms, in which the host queues the calls."""

Call = Callable[[], Any]
"""What is timed; its result is ignored."""
Make = Callable[[], Call]
"""Makes a call with buffers of its own."""


def time_us(make: Make, input_bytes: int) -> list[float]:
    """Microseconds of each of `CALLS` calls."""
    copies = max(2, min(-(-ROTATED_BYTES // max(input_bytes, 1)), CALLS))
    calls = [make() for _ in range(copies)]
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CALLS)]
    torch.cuda._sleep(BUSY_CYCLES)
    for i, (start, stop) in enumerate(events):
        start.record()
        calls[i % copies]()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1000 for start, stop in events]


class KernelRow(TypedDict):
    """One kernel at one size."""

    kernel: str
    by: str
    """Whose it is: `ours`, `PyTorch`, `TE`, `DeepGEMM`, `cuBLAS`."""
    shape: str
    us: NotRequired[Spread]
    """Microseconds of a call."""
    gb_per_s: NotRequired[float]
    """The bytes that it has to read and write, by the median time."""
    share_of_copy: NotRequired[float]
    """Of the GB/s of the `copy` before it."""
    tflops: NotRequired[float]
    share_of_dense: NotRequired[float]
    """Of the TFLOP/s of the dense GEMM by cuBLAS of its kind."""
    error: NotRequired[str]


class Bench:
    """Collects rows and prints each as it comes."""

    def __init__(self, only: str) -> None:
        self.only = only
        self.rows: list[KernelRow] = []
        self.copy_gb_s = 0.0
        """Of the last `copy`."""
        self.dense: dict[str, float] = {}
        """TFLOP/s of cuBLAS's dense GEMMs, by kind."""

    def run(
        self,
        kernel: str,
        by: str,
        shape: str,
        make: Make,
        input_bytes: int,
        moved_bytes: int = 0,
        operations: float = 0,
        kind: str = "",
    ) -> None:
        """Time one kernel at one size, and keep its row.

        `input_bytes` are what one call from `make` reads: they say how many calls have to take
        turns. `moved_bytes`, what it has to read and write, give GB/s; `operations`, FLOPs, give
        TFLOP/s. What is called `copy`, and what is by `cuBLAS`, is what later ones are compared
        with: a GEMM with the dense one of the same `kind`.
        """
        if self.only not in f"{kernel} {by} {shape}" and by != "cuBLAS" and kernel != "copy":
            return
        try:
            times = time_us(make, input_bytes)
        except Exception as error:  # a peer may lack the operation; ours failing is shown too
            torch.cuda.synchronize()
            text = str(error).strip().partition("\n")[0][:100]
            print(f"{kernel:26} {by:12} {shape:26} failed: {type(error).__name__}: {text}")
            self.rows.append({"kernel": kernel, "by": by, "shape": shape, "error": text})
            return
        us = statistics.median(times)
        row: KernelRow = {"kernel": kernel, "by": by, "shape": shape, "us": spread(times)}
        line = f"{kernel:26} {by:12} {shape:26} {us:9.1f} us"
        if moved_bytes:
            row["gb_per_s"] = moved_bytes / us / 1e3
            if kernel == "copy":
                self.copy_gb_s = row["gb_per_s"]
            row["share_of_copy"] = row["gb_per_s"] / self.copy_gb_s
            line += f" {row['gb_per_s']:7.0f} GB/s {row['share_of_copy']:6.0%} of a copy"
        if operations:
            row["tflops"] = operations / us / 1e6
            if by == "cuBLAS":
                self.dense[kind] = row["tflops"]
            line += f" {row['tflops']:7.0f} TFLOP/s"
            if kind in self.dense:
                row["share_of_dense"] = row["tflops"] / self.dense[kind]
                line += f" {row['share_of_dense']:6.0%} of dense {kind}"
        print(line, flush=True)
        self.rows.append(row)
