"""Run by tests under torchrun instead of scripts.bench.measure: rank 1 runs out of memory in its
second step, while rank 0 waits for it in a collective that nothing ends, as in a kernel."""

import os
from typing import Any

import torch
import torch.distributed as dist

from scripts.bench.measure.__main__ import main
from scripts.bench.stacks.ours import Ours
from train.failure import run_process

real_step = Ours.step
groups: list[Any] = []


def step(self, batches):
    if not groups:
        groups.append(dist.new_group())  # of its own: what rank 1 calls later does not end it
        return real_step(self, batches)
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 TiB")
    dist.barrier(groups[0])


Ours.step = step  # type: ignore[method-assign]
if __name__ == "__main__":
    run_process(main)
