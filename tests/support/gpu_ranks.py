"""A process for each GPU, in one NCCL group."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_gpus(
    ranks: int, work: Callable[[int, int], None], folder: Path, within_s: int, collective_s: int
) -> None:
    """Call `work(rank, ranks)` on each; skips the test where there are fewer GPUs.

    Fails where it takes over `within_s` in all, or a collective over `collective_s`.
    """
    if (gpus := torch.cuda.device_count()) < ranks:
        pytest.skip(f"needs {ranks} GPUs, there are {gpus}")
    # Spawned, not forked: this process has asked the driver about its GPUs.
    arguments = (ranks, work, f"file://{folder}/store", collective_s)
    processes = mp.spawn(_on_rank, arguments, nprocs=ranks, join=False)
    assert processes is not None
    deadline = time.monotonic() + within_s
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, f"ranks did not finish in {within_s} s"
    finally:
        for process in processes.processes:
            process.kill()


def _on_rank(
    rank: int,
    ranks: int,
    work: Callable[[int, int], None],
    meeting_point: str,
    collective_s: int,
) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method=meeting_point,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=collective_s),
        device_id=torch.device("cuda", rank),
    )
    work(rank, ranks)
    dist.destroy_process_group()
