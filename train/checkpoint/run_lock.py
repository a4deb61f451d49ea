"""One launch per run folder at a time: two would overwrite each other's checkpoints."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from train.config import ConfigError

NAME = "in_use"
PATIENCE_S = 5.0
"""How long the previous processes may take to end: a killed process first frees its memory."""


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Lock the folder `run_dir` for this process. Only rank 0 does anything.

    The lock ends with the process, however it ends. Processes that it forks do not hold it. Raises
    ConfigError if another process holds it, on this machine or, where the file system's locks reach
    that far, on another one. A file system without locks is not locked.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = run_dir / NAME
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    # Without the library's fallback for a file system that has no locks: its mark outlives a kill.
    lock = FileLock(path, timeout=PATIENCE_S, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another run is using {run_dir} ({path.read_text().strip()}); wait for "
            "its end, stop it, or choose another run.name"
        ) from None
    except OSError:
        pass  # this file system has none
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    try:
        yield
    finally:
        lock.release()
