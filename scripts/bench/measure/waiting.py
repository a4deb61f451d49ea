"""Ranks that are started ahead: they say when they have loaded, and wait until they are asked, as
long as somebody lives who would.

Signals do not tell them: a torchrun that gets one while it starts its ranks leaves them behind. So
who asks holds a lock, which the system releases however its holder ends.
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from train.config import ConfigError

LOCK = "asks"
LOADED = "loaded"


def hold(folder: Path) -> BinaryIO:
    """A file in `folder`: as long as it is open, somebody lives who may ask."""
    lock = (folder / LOCK).open("wb")
    with suppress(OSError):  # a file system without locks: `_is_left` finds none either
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def wait_for(file: Path) -> None:
    """Return when `file` is there. Raises ConfigError where its folder is not, or no longer, or
    the benchmark that held that has ended."""
    while True:
        if not file.parent.is_dir():
            raise ConfigError(f"--wait-for {file}: there is no folder {file.parent}")
        if _is_left(file.parent):
            raise ConfigError(f"--wait-for {file}: the benchmark that would write it has ended")
        if file.exists():
            return
        time.sleep(0.05)


def say_loaded(folder: Path) -> None:
    """This rank has loaded what it needs: what follows until it is asked takes no time of the host
    from others."""
    with suppress(OSError):  # where the folder is gone, `wait_for` says so
        (folder / f"{LOADED}.{os.environ.get('RANK', '0')}").touch()


def have_loaded(folder: Path) -> int:
    """How many ranks have said so."""
    return len(list(folder.glob(f"{LOADED}.*")))


def _is_left(folder: Path) -> bool:
    """Whether the holder has ended; False where none is known, as for a file written by hand."""
    try:
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
