"""One training in a run folder at a time: two would write over each other's checkpoints."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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
    try:
        file = (run_dir / NAME).open("a+")
    except OSError as error:
        raise ConfigError(f"{run_dir / NAME}: {error.strerror}") from None
    with file:
        deadline = time.monotonic() + PATIENCE_S
        while not _lock(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise ConfigError(
                    f"another training is at work in {run_dir} ({file.read().strip()}); wait for "
                    "its end, stop it, or choose another run.name"
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _lock(file: IO[str]) -> bool:
    """Take the file's lock if it is free."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # this file system has none
    return True
