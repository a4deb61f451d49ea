"""A timed window of training steps, of any stack."""

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from scripts.bench.measure.busiest_rank import busiest_rank
from scripts.bench.stacks import Stack
from train.data.batches import Batch
from train.metrics.throughput import GIB
from train.parallel import Ranks
from train.profiling.timer import Timer

WARMUP = 20
"""Steps before a window. Some compile kernels long after the first: Triton compiles a kernel again
for a count that is a multiple of 16, and how many rows arrive is another count every step. The
longer the warm-up, the fewer windows have such a step; the median step tells of those that do."""


@dataclass
class Window:
    """What was measured, under the names that it has in the results; the same on every rank."""

    step_ms: float
    """Mean over the window, on the slowest rank: wall time from a barrier to the end of the last
    step's work, by the number of steps."""
    single_step_ms: list[float]
    """Each single step, on the rank where it took longest: by events on the GPU, on a CPU by the
    clock."""
    peak_allocated_gib: float | None
    """Peak memory of tensors, on the rank with the most; None on a CPU."""
    first_loss: float
    """Mean loss of the very first step, with the weights that all stacks but stock's `fp8_param`
    begin with."""
    final_loss: float
    """Mean loss of the window's last step."""
    dropped_rows: int = 0
    """Rows dropped on all ranks, in all steps of the window."""
    redone_steps: int = 0
    """Steps of the window that were repeated for lack of room (`moe.capacity=auto`); their time is
    included."""
    waited_steps: int = 0
    """Steps of the window that waited because that room would not have fitted into memory."""
    room: float | None = None
    """That room in the window's last step, in even shares of a rank, the mean of the layers; None
    where the layers waited."""
    step_joules: float | None = None
    """Energy of all GPUs, per step; None where it is not measured."""
    outside_allocator_gib: float | None = None
    """Memory of the GPU that PyTorch's allocator does not hold, on the rank with the most: CUDA's
    context, NCCL's and DeepEP's buffers, and other processes' memory; None on a CPU."""
    busiest_rank: float | None = None
    """Rows of the rank with most over the mean, in one more step after the window; None where no
    router was seen."""

    def figures(self) -> dict[str, Any]:
        """For JSON, which has no NaN: a loss that is not finite is null."""
        losses = (self.first_loss, self.final_loss)
        first, final = (loss if math.isfinite(loss) else None for loss in losses)
        return {**asdict(self), "first_loss": first, "final_loss": final}


def measure(
    stack: Stack,
    batches: Sequence[Batch],
    ranks: Ranks,
    warmup: int,
    steps: int,
    quiet: Callable[[], None] | None = None,
) -> Window:
    """Warm up, at least one step, and time `steps` steps. All ranks call it.

    quiet: waits until nothing else keeps the host busy. It is called after the first step, in which
    kernels are compiled; the rest of the warm-up comes between that wait and what is timed.
    """
    on_gpu = ranks.device.type == "cuda"
    queue = itertools.cycle(batches)
    first = float(stack.step(queue).detach())
    if quiet:
        quiet()
    for _ in range(warmup - 1):
        stack.step(queue)
    stack.dropped_rows(), stack.redone_steps(), stack.waited_steps()  # of the warm-up
    timer, laps = Timer(ranks.device), []
    with without_collector():
        wait(ranks)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(ranks.device)
        dist.barrier()
        wait(ranks)
        before, begin = _joules(ranks), time.perf_counter()
        for _ in range(steps):
            timer.start()
            loss = stack.step(queue)
            laps.append(timer.stop())
        wait(ranks)
        seconds, after = (time.perf_counter() - begin) / steps, _joules(ranks)

    singles = [lap.milliseconds()["total"] for lap in laps]
    peak = torch.cuda.max_memory_allocated(ranks.device) / GIB if on_gpu else 0.0
    outside = _outside_gib(ranks.device) if on_gpu else 0.0
    largest = torch.tensor([seconds * 1e3, peak, outside, *singles], dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    energy = math.nan if before is None or after is None else (after - before) / steps
    sums = [first, float(loss.detach()), stack.dropped_rows(), energy]
    summed = torch.tensor(sums, dtype=torch.float64)
    dist.all_reduce(summed)
    step_ms, peak, outside, *singles = largest.tolist()
    first_loss, final_loss, dropped, joules = summed.tolist()
    # The same on all ranks.
    redone, waited, room = stack.redone_steps(), stack.waited_steps(), stack.room()
    busiest = busiest_rank(stack.model, lambda: stack.step(queue), ranks)
    return Window(
        step_ms=step_ms,
        single_step_ms=singles,
        peak_allocated_gib=peak if on_gpu else None,
        first_loss=first_loss,
        final_loss=final_loss,
        dropped_rows=int(dropped),
        redone_steps=redone,
        waited_steps=waited,
        room=room,
        step_joules=None if math.isnan(joules) else joules,
        outside_allocator_gib=outside if on_gpu else None,
        busiest_rank=busiest,
    )


@contextmanager
def without_collector() -> Iterator[None]:
    """Python collects what is unreachable before, and nothing inside: that would hold the host up
    in one step or another. NVIDIA's recipes for megatron-core collect by hand, between steps."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def wait(ranks: Ranks) -> None:
    """Return when the GPU has done all that was queued; at once on a CPU."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def _outside_gib(device: torch.device) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / GIB


def _joules(ranks: Ranks) -> float | None:
    """What this rank's GPU has used since its driver was loaded; None where NVML does not say."""
    if ranks.device.type != "cuda":
        return None
    with suppress(Exception):
        import pynvml

        return pynvml.nvmlDeviceGetTotalEnergyConsumption(_nvml_handle(ranks.device)) / 1e3
    return None


@cache
def _nvml_handle(device: torch.device) -> Any:
    """NVML's handle of a GPU; the library is loaded once per process."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
