"""Prints what is waited for, where that takes long, so that no terminal stays silent."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

AFTER_S = 3.0
"""What takes less gets no line."""
EVERY_S = 10.0
"""Between two lines."""
WAITING_EVERY_S = 30.0
"""Between two lines of a rank that waits for others: there may be many ranks."""
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

    def line(seconds: float) -> str:
        part = "" if done is None else f"{min(done(), total) / GB:.2f} of "
        return f"{what}: {part}{total / GB:.2f} GB, {seconds:.0f} s so far"

    with _repeated(line, AFTER_S, EVERY_S, sys.stdout):
        yield
    seconds = time.monotonic() - begin
    if seconds > AFTER_S:
        _print(f"{what}: {total / GB:.2f} GB in {seconds:.0f} s", sys.stdout)


@contextmanager
def waiting(what: str, at_most_s: float | None = None, speaks: bool = True) -> Iterator[None]:
    """While this waits long, lines on stderr: `what`, such as "rank 1 waits for rank 0", for how
    long already, and the limit if there is one."""
    if not speaks:
        yield
        return
    limit = "" if at_most_s is None else f" of at most {at_most_s:g} s"

    def line(seconds: float) -> str:
        return f"{what}: {seconds:.0f} s so far{limit}"

    with _repeated(line, AFTER_S, WAITING_EVERY_S, sys.stderr):
        yield


@contextmanager
def _repeated(
    line: Callable[[float], str], after_s: float, every_s: float, file: TextIO
) -> Iterator[None]:
    """Prints what `line` makes of the seconds so far, first `after_s`, then `every_s`."""
    begin = time.monotonic()
    ended = threading.Event()

    def speak() -> None:
        wait = after_s
        while not ended.wait(wait):
            _print(line(time.monotonic() - begin), file)
            wait = every_s

    thread = threading.Thread(target=speak, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _print(line: str, file: TextIO) -> None:
    with suppress(OSError, ValueError):  # a closed terminal must not end the run
        print(line, file=file, flush=True)
