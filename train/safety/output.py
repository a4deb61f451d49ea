"""Whatever stdout and stderr do, training continues, saves and ends as it would.

A reader may go away (`| head`, `| tee` at Ctrl-C, a closed terminal), the disk of a log may be
full, and a pipe may have no reader that empties it. Each would make a print raise or block. Here
text that cannot be written waits in memory, up to a limit, and print returns. `metrics.jsonl` still
has every number.

print, rich, logging, warnings and the libraries use the streams in `sys`, so those are replaced.
"""

import io
import os
import select
import stat
import sys
import threading
from contextlib import suppress
from typing import Any

PATIENCE_S = 1.0
"""How long to wait for a pipe or terminal that accepts no more text; once, and again only after it
has accepted some."""

CHUNK = 4096
"""Bytes that a pipe which says that it has room takes without waiting (PIPE_BUF)."""

LIMIT = 1 << 20
"""Most bytes that wait; later ones are dropped."""


def protect() -> None:
    """Replace stdout and stderr by streams that neither fail nor block."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # started with `>&-`: the next file that is opened would be stdout
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout, sys.stderr = _stream(sys.stdout, 1), _stream(sys.stderr, 2)


def last_words(line: str) -> None:
    """Print to stderr in a process that is about to end, without ever blocking."""
    with suppress(Exception):
        print(line, file=sys.stderr, flush=True)


def stderr_descriptor() -> int:
    """A stderr for C code: writing to it does not block."""
    outlet = getattr(sys.stderr, "buffer", None)
    return outlet.descriptor if isinstance(outlet, Outlet) else 2


class Outlet(io.RawIOBase):
    """The bytes that a stream writes to a file descriptor. `write` takes all of them, always."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.descriptor = _opened_again(number)
        self._start()
        # A data worker is a fork of this process: what waits here must not be written twice.
        os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        self._waiting = bytearray()
        self._stalled = False
        self._lock = threading.RLock()  # of rich's thread, the watchdog's and the main one

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, text: Any) -> int:
        with self._lock:
            self._waiting += text
            with suppress(OSError):  # tried again with the next text
                self._drain()
            del self._waiting[LIMIT:]
        return len(text)

    def flush(self) -> None:
        with self._lock, suppress(OSError):
            self._drain()

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self.descriptor, select.POLLOUT)
        while self._waiting:
            if not poll.poll(0 if self._stalled else PATIENCE_S * 1000):
                self._stalled = True
                return
            written = os.write(self.descriptor, self._waiting[:CHUNK])
            del self._waiting[:written]
            self._stalled = False


def _stream(old: Any, number: int) -> io.TextIOWrapper:
    encoding = getattr(old, "encoding", None) or "utf-8"
    if old is not None:
        with suppress(Exception):
            old.flush()
    # No BufferedWriter between: what is buffered where an error strikes would be written twice.
    raw: Any = Outlet(number)
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def _opened_again(number: int) -> int:
    """The same pipe or terminal, non-blocking. That is a flag of an open file, and others share
    this one: the shell, torchrun, the other ranks."""
    mode = os.fstat(number).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            return os.open(f"/proc/self/fd/{number}", flags)
    return number
