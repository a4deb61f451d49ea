"""Writes a file whole or not at all: after an error or Ctrl-C the one before is there, or none."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path`, to write to: it becomes `path` when the block ends, and is deleted
    where that fails. Raises OSError."""
    new = unfinished(path)
    try:
        yield new
        new.replace(path)
    except BaseException:
        with suppress(OSError):  # the error that is on its way says more
            new.unlink()
        raise


def unfinished(path: Path) -> Path:
    """Where a file or folder is written until it is whole: no other process writes there."""
    return path.with_name(f"{path.name}.{os.getpid()}.unfinished")


def check(path: Path) -> None:
    """Raise OSError where no file of this name can be made, before what it is to hold is computed.

    Leaves nothing; a folder that is missing is made by the caller, when it writes the file.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    with tempfile.TemporaryFile(dir=folder):
        pass
