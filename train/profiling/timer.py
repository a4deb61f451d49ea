"""Time of named parts of a step, by CUDA events on a GPU and by the clock on a CPU.

    timer = Timer(device)
    timer.start()
    with timer.part("attention"):
        ...
    lap = timer.stop()
    lap.milliseconds()    # {"attention": ..., "other": ..., "total": ...}

Nothing waits for the GPU until `milliseconds`. A part is what lies between two events on the
current stream: kernels, and gaps in which the GPU waits for the host. Parts are disjoint, so they
and the rest, `other`, add up to the total.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import record_function

P = ParamSpec("P")
R = TypeVar("R")

Moment = torch.cuda.Event | float
"""An event on a GPU's stream, or seconds by the clock."""


@dataclass(frozen=True)
class Lap:
    """What happened between a timer's start and its stop."""

    start: Moment
    stop: Moment
    spans: list[tuple[str, Moment, Moment]]  # part, its start, its stop

    def milliseconds(self) -> dict[str, float]:
        """The sum of each part, `total` from start to stop, and `other`, which no part covers.

        Waits for the GPU to reach the stop.
        """
        if isinstance(self.stop, torch.cuda.Event):
            self.stop.synchronize()
        parts: dict[str, float] = {}
        for name, start, stop in self.spans:
            parts[name] = parts.get(name, 0.0) + _milliseconds(start, stop)
        total = _milliseconds(self.start, self.stop)
        return {**parts, "other": total - sum(parts.values()), "total": total}


class Timer:
    """Notes when parts begin and end, from `start` to `stop`.

    A part inside another belongs to the outer one, so a layer whose GEMM quantizes internally and
    one that calls `quantize` for it are timed alike.

    With `named`, parts are also ranges of torch.profiler (`record_function`), the inner ones too.

    For one thread at a time. Backward, in a thread of its own on a GPU, is such a case: forward
    waits for it.
    """

    def __init__(self, device: torch.device, named: bool = False) -> None:
        self._cuda = device.type == "cuda"
        self._named = named
        self._spans: list[tuple[str, Moment, Moment]] = []
        self._open: tuple[str, Moment, record_function | None] | None = None
        self._start: Moment = 0.0

    def start(self) -> None:
        """Begin a lap."""
        self._spans, self._open = [], None
        self._start = self._now()

    def stop(self) -> Lap:
        """End the lap."""
        return Lap(self._start, self._now(), self._spans)

    def begin(self, name: str) -> bool:
        """Open a part that `end` closes; False, and nothing to close, inside another part."""
        if self._open is not None:
            return False
        named = record_function(name) if self._named else None
        if named:
            named.__enter__()
        self._open = (name, self._now(), named)
        return True

    def end(self) -> None:
        """Close the part that `begin` opened."""
        assert self._open is not None, "no part is open"
        name, start, named = self._open
        self._open = None
        self._spans.append((name, start, self._now()))
        if named:
            named.__exit__(None, None, None)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time inside the `with`."""
        if self.begin(name):
            try:
                yield
            finally:
                self.end()
        elif self._named:
            with record_function(name):
                yield
        else:
            yield

    def wrapper(self, name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """`timed` of a function that is given later."""
        return functools.partial(self.timed, name=name)

    def timed(self, function: Callable[P, R], name: str) -> Callable[P, R]:
        """The same function as a part."""

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.part(name):
                return function(*args, **kwargs)

        return wrapper

    def _now(self) -> Moment:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _milliseconds(start: Moment, stop: Moment) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(stop, torch.cuda.Event)
        return start.elapsed_time(stop)
    assert isinstance(stop, float)
    return (stop - start) * 1e3
