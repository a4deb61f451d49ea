"""How fast a checkpoint is written to disk, compared with `dd`; see scripts/bench/checkpoint/.

Every rank has a state of its own, of random numbers, as some disks compress zeros. In each repeat,
one after the other: the state is copied as for a save during training; DCP's own writer writes it
by one thread; `dd` writes that file again, from memory; it is hashed by one thread; and it is saved
as at the end of a run, hashed and written by several. Where other work keeps the cores busy, the
seconds of this process on a core (`cpu_s`) say more than those of the clock.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from scripts.bench.machine import describe_machine
from scripts.bench.results import spread, write_json
from train.checkpoint import checksums
from train.checkpoint.files import checkpoint_of
from train.checkpoint.host_copy import HostCopy
from train.checkpoint.writer import BYTES_PER_FILE, OfOneRank, Writer
from train.config import load

TENSORS_MIB = (288, 144, 9, 1)
"""Like an expert layer of moe_small, its attention and its norms."""


def run(device: torch.device, gb: float, folder: Path, repeats: int, out: Path) -> int:
    """Measure on all ranks that were started, `gb` each; the first one writes `out`."""
    alone = "RANK" not in os.environ
    store = dist.HashStore() if alone else None
    rank, ranks = (0, 1) if alone else (-1, -1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    state = make_state(device, round(gb * 1e9), rank)
    size = sum(t.numel() * t.element_size() for t in state.values())
    begin = time.perf_counter()
    copy = HostCopy(device)
    copy.begin(state).result()
    first_copy = _slowest(time.perf_counter() - begin)
    seconds: dict[str, list[float]] = {}
    cores: dict[str, list[float]] = {}
    with _own(folder) as own:
        for repeat in range(repeats):
            for name, work in works(state, size, copy, own, rank, repeat).items():
                dist.barrier()
                begin, on_core = time.perf_counter(), time.process_time()
                work()
                cores.setdefault(name, []).append(_slowest(time.process_time() - on_core))
                seconds.setdefault(name, []).append(_slowest(time.perf_counter() - begin))
                copy.begin(state).result()  # after a copy that may still be running
            dist.barrier()
            if rank == 0:
                for path in own.glob("step_*"):
                    shutil.rmtree(path)
    copy.close()
    if rank == 0:
        total = size * ranks / 1e9
        result = {
            **describe_machine(device, ranks),
            "gb": total,
            "threads": checksums.threads(1 + size // BYTES_PER_FILE),
            "first_copy_s": first_copy,
            **{name: spread(values) for name, values in seconds.items()},
            "cpu_s": {name: spread(values)["median"] for name, values in cores.items()},
            "save_over_dd": spread(seconds["save_s"])["median"] / spread(seconds["dd_s"])["median"],
        }
        write_json(out, result)
        for name, values in seconds.items():
            on_core = spread(cores[name])["median"]
            print(f"{name:<14}{spread(values)['median']:8.2f} s, {on_core:.2f} s on a core")
        print(f"{out}: {total:.2f} GB")
    dist.barrier()
    dist.destroy_process_group()
    return 0


@contextmanager
def _own(folder: Path) -> Iterator[Path]:
    """A new folder in `folder`, the same on all ranks, and gone afterwards: nothing that was there
    is touched."""
    made: list[str | None] = [None]
    if dist.get_rank() == 0:
        made = [tempfile.mkdtemp(prefix="bench-", dir=folder)]
    dist.broadcast_object_list(made)
    assert made[0] is not None
    try:
        yield Path(made[0])
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(made[0], ignore_errors=True)


def make_state(device: torch.device, size: int, rank: int) -> dict[str, Tensor]:
    """About `size` bytes of tensors, which no other rank has."""
    generator = torch.Generator(device).manual_seed(rank)
    state: dict[str, Tensor] = {}
    left = size
    while left > 0:
        for mib in TENSORS_MIB:
            if left > 0:
                count = max(1, min(left, mib << 20) // 4)
                t = torch.empty(count, device=device).normal_(generator=generator)
                state[f"rank{rank}.{len(state)}"] = t
                left -= 4 * count
    return state


def works(
    state: dict[str, Tensor],
    size: int,
    copy: HostCopy,
    folder: Path,
    rank: int,
    repeat: int,
) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name in the result; writes into `folder`."""
    config = load("configs/demo_cpu.yaml", ["checkpoint.keep=9"])
    own_state: OfOneRank = {"rng": {}, "metrics": None}  # type: ignore[typeddict-item]

    def dd() -> None:
        target = folder / f"dd_{rank}"
        source = folder / "step_plain" / f"__{rank}_0.distcp"
        command = ["dd", f"if={source}", f"of={target}", "bs=16M", "conv=fdatasync"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        target.unlink()

    def plain_write() -> None:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "step_plain"))

    def save() -> None:
        final = checkpoint_of(folder, repeat)
        writer = Writer(final, config, {"step": repeat}, rank, own_state, None, size)
        dcp.save(state, storage_writer=writer)

    def hash_all() -> None:
        digest = hashlib.sha256()
        for t in state.values():
            digest.update(t.cpu().numpy().data)

    return {
        "copy_stop_s": lambda: copy.begin(state),
        "copy_s": lambda: copy.begin(state).result(),
        "one_thread_s": plain_write,
        "dd_s": dd,
        "hash_s": hash_all,
        "save_s": save,
    }


def _slowest(seconds: float) -> float:
    """The largest of all ranks' seconds."""
    t = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return float(t)
