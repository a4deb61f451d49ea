"""A function on many jobs, in processes that live no longer than this one."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

from train.config import ConfigError
from train.safety.parent import end_with_parent

THREADS = "RAYON_NUM_THREADS"
"""Variable with the number of threads of the tokenizers library, which reads it when it starts
them."""

POLL_S = 0.2
"""Between two looks at how far the processes are."""


class Said(Protocol):
    """Called often to report progress: what is being done, how much, and of what total if known."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...


Function = Callable[[Any, int, Callable[[int], None]], None]
"""Called with what all jobs share, a job, and a function that takes how much was done."""


def spread(
    function: Function,
    shared: Any,
    jobs: Sequence[int],
    workers: int,
    said: Said,
    what: str,
    total: int | None = None,
) -> None:
    """Do all jobs, in this process where one is asked for or there is one job.

    Raises the error of the first job that fails, and ConfigError where a process was killed; then
    ends the others.
    """
    if workers == 1 or len(jobs) < 2:
        done = 0

        def report(size: int) -> None:
            nonlocal done
            done += size
            said(what, done, total)

        for job in jobs:
            function(shared, job, report)
        return
    processes = min(workers, len(jobs))
    # A new interpreter each: the threads of the libraries do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("Q")
    with _threads(workers // processes):
        pool = ProcessPoolExecutor(
            processes, context, _begin, (function, shared, counter, os.getpid())
        )
        try:
            with _deaf():
                pending = {pool.submit(_run, job) for job in jobs}
            while pending:
                ended, pending = wait(pending, POLL_S, FIRST_COMPLETED)
                said(what, counter.value, total)
                for future in ended:
                    future.result()
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()  # before its files are removed
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise ConfigError(
                    "a process that prepares data was killed, mostly for lack of memory; the same "
                    f"command continues where it stopped, with fewer --workers than {processes}"
                ) from None
            raise
        pool.shutdown()


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C; this one handles it right after, and ends
    them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The tokenizers library uses this many threads in each process that is started inside."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = str(count)
    try:
        yield
    finally:
        del os.environ[THREADS]
        if before is not None:
            os.environ[THREADS] = before


_shared: tuple[Function, Any, Any]


def _begin(function: Function, shared: Any, counter: Any, parent: int) -> None:
    """Set up a process before its first job."""
    global _shared
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it was killed while this process imported what it needs
        os._exit(1)
    _shared = (function, shared, counter)


def _run(job: int) -> None:
    function, shared, counter = _shared

    def report(size: int) -> None:
        with counter.get_lock():
            counter.value += size

    function(shared, job, report)
