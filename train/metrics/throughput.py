"""Speed, MFU and memory.

Speeds are wall time over whole logging intervals, not a step timed on its own: a GPU works
asynchronously, and waiting for it after every step would slow down what is measured. So the device
is waited for once per interval, and around what is left out.
"""

import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

log = logging.getLogger(__name__)

GIB = 1024**3

PEAK_BF16 = {
    # Ampere
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    # Ada
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    # Hopper
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,  # SXM
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H800": 989.4e12,  # SXM
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA GH200 120GB": 989.4e12,
    "NVIDIA GH200 144G HBM3e": 989.4e12,
    # Blackwell
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}
"""Dense BF16 tensor-core peak in FLOP/s by the name that CUDA reports; from NVIDIA's data sheets,
halved where they quote it with sparsity."""


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense BF16 peak in FLOP/s of the GPU with this `torch.cuda.get_device_name`.

    Only whole names match: a part of a GPU ("NVIDIA H100 80GB HBM3 MIG 1g.10gb") and a variant
    with other clocks ("NVIDIA H100 PCIe") carry the name of a faster one. None when unknown.
    """
    return PEAK_BF16.get(device_name)


class Meter:
    """Throughput, MFU and memory of a run, one logging interval at a time.

        meter = Meter(flops_per_token, world_size, device, warmup_steps=3, peak_flops=989.4e12)
        meter.start()
        for ...:
            ...                                  # an optimizer step
            meter.step(tokens, data_seconds)
            if it is time to log:
                metrics |= meter.interval()
            with meter.pause():
                ...                              # validation, a checkpoint

    The first `warmup_steps` steps after `start` are left out, after a resume too: they pay for
    allocations, compilation and autotuning. An interval in which no step is left has no
    throughput or time.
    """

    def __init__(
        self,
        flops_per_token: float,
        world_size: int,
        device: torch.device,
        warmup_steps: int = 0,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`peak_flops` is one GPU's, from `peak_bf16_flops`; without it there is no MFU."""
        self.flops_per_token = flops_per_token
        self.world_size = world_size
        self.device = device
        self.peak_flops = peak_flops
        self._warmup_left = warmup_steps
        self._clock = clock
        self._history: dict[str, list[float]] = {}
        self.start()

    def start(self) -> None:
        """Start the clock; call it where the first step begins."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._restart()

    def step(self, tokens: int, data_seconds: float = 0.0) -> None:
        """Note one optimizer step: its tokens over all ranks, and how long it waited for data."""
        if self._warmup_left:
            self._warmup_left -= 1
            if not self._warmup_left:
                self._restart()
            return
        self._steps += 1
        self._tokens += tokens
        self._data_seconds += data_seconds

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time spent inside, such as a validation's. Does not nest."""
        begin = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - begin

    def interval(self) -> dict[str, float]:
        """Metrics since the last call, by their W&B names; then a new interval begins.

        Units are in the names. Times are means over the interval's steps. `tokens_per_sec` is of
        all ranks together, everything else of this rank. A GPU's peak memory is the interval's; a
        CPU process has one peak in its life, so `memory/peak_rss_gib` never falls.
        """
        seconds = self._now() - self._mark - self._paused
        metrics: dict[str, float] = {}
        if self._steps:
            per_rank = self._tokens / seconds / self.world_size
            metrics["throughput/tokens_per_sec"] = self._tokens / seconds
            metrics["throughput/tokens_per_sec_per_gpu"] = per_rank
            metrics["throughput/tflops_per_gpu"] = per_rank * self.flops_per_token / 1e12
            if self.peak_flops is not None:
                metrics["throughput/mfu"] = per_rank * self.flops_per_token / self.peak_flops
            metrics["time/step_ms"] = seconds / self._steps * 1e3
            metrics["time/data_ms"] = self._data_seconds / self._steps * 1e3
        metrics |= self._memory()
        for name, value in metrics.items():
            self._history.setdefault(name, []).append(value)
        self._restart()
        return metrics

    def summary(self) -> dict[str, float]:
        """The run so far: `<name>_median` over intervals, and `<name>_max` for memory."""
        return {
            f"{name}_max" if name.startswith("memory/") else f"{name}_median": (
                max(values) if name.startswith("memory/") else statistics.median(values)
            )
            for name, values in self._history.items()
        }

    def _restart(self) -> None:
        self._steps = 0
        self._tokens = 0
        self._data_seconds = 0.0
        self._paused = 0.0
        self._mark = self._now()

    def _now(self) -> float:
        # Work that is queued on the GPU belongs to the time before this moment.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()

    def _memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            # Linux counts in KiB, macOS in bytes.
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            return {"memory/peak_rss_gib": peak / GIB}
        peaks = {
            "memory/peak_allocated_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
            "memory/peak_reserved_gib": torch.cuda.max_memory_reserved(self.device) / GIB,
        }
        torch.cuda.reset_peak_memory_stats(self.device)
        return peaks
