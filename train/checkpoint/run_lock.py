"""One training in a run folder at a time: two would write over each other's checkpoints."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from train.config import ConfigError

NAME = "in_use"
PATIENCE_S = 5.0
"""How long the training before may take to end: a killed process first gives back its memory."""


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keep the folder `run_dir` for this process. Only rank 0 does anything.

    The lock ends with the process, however it ends. Processes that it forks do not have it.
    Raises ConfigError if another process has it, on this machine or, where the file system's locks
    reach that far, on another one. A file system without locks is let be.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = run_dir / NAME
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    # Without the library's way around a file system that has no locks: its mark outlives a kill.
    lock = FileLock(path, timeout=PATIENCE_S, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another training is at work in {run_dir} ({path.read_text().strip()}); wait for "
            "its end, stop it, or choose another run.name"
        ) from None
    except OSError:
        pass  # this file system has none
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    try:
        yield
    finally:
        lock.release()
