"""Several ranks on one machine, for tests: forked, so that nothing is imported again."""

import faulthandler
import gc
import logging
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train import (
    failure,
    loop,  # noqa: F401  # here, or each rank would spend seconds on it
)
from train.__main__ import main, run
from train.data import batches as data  # noqa: F401  # here, or each rank would spend seconds on it

ONLY_WAITS = "only waits"
"""Name of a thread that may run while ranks are forked: it holds nothing while it waits."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120):
    """Run `function(rank, *args)` on each rank of a gloo group; their results in order.

    The first error of any rank is raised here, and the others are killed.
    """
    return _run(world_size, _in_group, (function, args), timeout)


def run_alone(function: Callable[..., Any], *args: Any, timeout: float = 120):
    """Run `function(*args)` in a process of its own, which may start a group; its result."""
    return _run(1, _alone, (function, args), timeout)[0]


def run_main(
    world_size: int, main: Callable[[list[str]], int], argv: list[str], timeout: float = 180
) -> list[int]:
    """A command's `main(argv)` on this many ranks, as torchrun would start them; their exit
    codes."""
    return _run(world_size, _main, (main, argv), timeout)


def run_train(world_size: int, argv: list[str], timeout: float = 180) -> list[int]:
    """`python -m train ARGV` on this many ranks, as torchrun would start them; their exit codes."""
    return run_main(world_size, main, argv, timeout)


def _run(world_size: int, target: Callable[..., Any], args: tuple[Any, ...], timeout: float):
    context = mp.get_context("fork")
    results, ports = context.Queue(), context.SimpleQueue()
    with tempfile.TemporaryFile() as stacks:
        given = (results, stacks.fileno(), target, args)
        processes = [
            context.Process(target=_child, args=(rank, world_size, ports, *given))
            for rank in range(world_size)
        ]
        store = _fork(processes, ports)
        found = _collect(results, processes, timeout, stacks.fileno())
    del store
    return [found[rank] for rank in range(world_size)]


def _fork(processes: list[Any], ports: Any) -> dist.TCPStore:
    """Start all ranks and tell them where to meet; they do as long as the result is kept.

    Only then, since a meeting point has a thread, which answers the first rank while the last is
    being forked: that one would wait forever for a lock of the C library that the thread held.
    """
    if _other_threads():
        gc.collect()  # such as a data loader that nobody uses any more, and its threads with it
        deadline = time.monotonic() + 5
        while _other_threads() and time.monotonic() < deadline:
            time.sleep(0.01)
    threads = _other_threads()
    assert not threads, (
        f"{threads} of an earlier test run in this process: a copy of it would wait forever for "
        "what they hold; such tests come last, in tests/conftest.py"
    )
    # What was dropped here and not collected yet is not the copies' to clean up: a store's end
    # waits for its thread, which does not come along.
    gc.freeze()
    for process in processes:
        process.start()
    gc.unfreeze()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in processes:
        ports.put(store.port)
    return store


def _other_threads() -> list[str]:
    threads = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    return [name for name in threads if name != ONLY_WAITS]


def _collect(results: Any, processes: list[Any], timeout: float, stacks: int) -> dict[int, Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(found) < len(processes):
            try:
                rank, value, error = results.get(timeout=0.5)
            except queue.Empty:
                dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
                assert not dead, f"a rank died with exit code {dead[0]}"
                assert time.monotonic() < deadline, (
                    f"not in {timeout} s; ranks {sorted(found)} did; the others hung in\n"
                    + _stacks([p for rank, p in enumerate(processes) if rank not in found], stacks)
                )
                continue
            assert error is None, f"rank {rank}:\n{error}"
            found[rank] = pickle.loads(value)
    finally:
        for process in processes:
            process.join(5 if len(found) == len(processes) else 0)
            process.kill()
    return found


def _stacks(processes: list[Any], file: int) -> str:
    """Ends the processes; what each of their threads was doing."""
    for process in processes:
        os.kill(process.pid, signal.SIGABRT)
        process.join(5)
    return os.pread(file, 1_000_000, 0).decode()


def _child(
    rank: int, world_size: int, ports: Any, results: Any, stacks: int, target: Any, args: Any
) -> None:
    _be_rank(rank, world_size, ports)
    faulthandler.enable(stacks)
    try:
        # Pickled here, since a queue would share tensors' memory with a process that is gone.
        results.put((rank, pickle.dumps(target(rank, *args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without the clean-up of the pytest process that this is a copy of


def _in_group(rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    dist.init_process_group("gloo")
    value = function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    return value


def _main(rank: int, main: Callable[[list[str]], int], argv: list[str]) -> int:
    return main(argv)


def _alone(rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(*args)


class Training:
    """A run in the background, one process a rank, to be harmed.

    `plant(rank)` runs in each process first. What they print goes to the file `log`.
    """

    def __init__(
        self,
        world_size: int,
        argv: list[str],
        log: Path,
        plant: Callable[[int], None] | None = None,
    ) -> None:
        self.log = log
        log.write_text("")
        context = mp.get_context("fork")
        ports = context.SimpleQueue()
        arguments = (world_size, ports, argv, log, plant)
        self.processes = [
            context.Process(target=_training, args=(rank, *arguments)) for rank in range(world_size)
        ]
        self._store: dist.TCPStore | None = _fork(self.processes, ports)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        self._store = None  # and its thread, before others are forked

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid
        os.kill(pid, number)

    def wait_until(self, what: Callable[[], object], timeout: float = 60) -> None:
        """Until `what` is true, while all ranks live."""
        deadline = time.monotonic() + timeout
        while not what():
            dead = [process.exitcode for process in self.processes if process.exitcode is not None]
            assert not dead, f"a rank ended with {dead[0]}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"not in {timeout} s:\n{self.log.read_text()}"
            time.sleep(0.002)

    def exit_codes(self, timeout: float = 60) -> list[int]:
        """Exit codes of all ranks, once they have ended; minus a signal's number if killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process, code in zip(self.processes, codes, strict=True):
            if code is None:
                self.signal(self.processes.index(process), signal.SIGABRT)  # writes its stack
                process.join(5)
        assert None not in codes, f"still there after {timeout} s:\n{self.log.read_text()}"
        return [code for code in codes if code is not None]


def _training(
    rank: int, world_size: int, ports: Any, argv: list[str], log: Path, plant: Any
) -> None:
    _be_rank(rank, world_size, ports)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    # pytest has replaced them by its own.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    logging.getLogger().handlers.clear()
    faulthandler.enable(handle)
    sys.argv = ["train", *argv]
    if plant is not None:
        plant(rank)
    run()
    os._exit(0)


def _be_rank(rank: int, world_size: int, ports: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports.get()),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.set_num_threads(1)
    # Without torchrun no rank is ended when another has ended, so none need let another report
    # first.
    failure.PATIENCE_S = 0.1


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl."""
    import json

    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
