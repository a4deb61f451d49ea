"""Says what is waited for, where that takes long: nobody should wonder at a silent terminal."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

AFTER_S = 3.0
"""What takes less is not worth a line."""
EVERY_S = 10.0
"""Between two lines."""
GB = 1e9


class Count:
    """Bytes so far, as several threads count them."""

    def __init__(self) -> None:
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._bytes += count

    def get(self) -> int:
        return self._bytes


@contextmanager
def said(
    what: str, total: int, done: Callable[[], int] | None = None, speaks: bool = True
) -> Iterator[None]:
    """While this takes long, lines on the terminal with how much of `total` bytes is `done`, or
    only how long it has taken. Only rank 0 `speaks`."""
    if not speaks:
        yield
        return
    begin = time.monotonic()
    ended = threading.Event()

    def speak() -> None:
        wait = AFTER_S
        while not ended.wait(wait):
            seconds = time.monotonic() - begin
            part = "" if done is None else f"{min(done(), total) / GB:.2f} of "
            _print(f"{what}: {part}{total / GB:.2f} GB, {seconds:.0f} s so far")
            wait = EVERY_S

    thread = threading.Thread(target=speak, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    seconds = time.monotonic() - begin
    if seconds > AFTER_S:
        _print(f"{what}: {total / GB:.2f} GB in {seconds:.0f} s")


def _print(line: str) -> None:
    with suppress(OSError, ValueError):  # a terminal that is gone ends no training
        print(line, flush=True)
