"""Writes a file whole or not at all: after an error or Ctrl-C the one before is there, or none."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train.config import ConfigError


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


def check_out(out: Path | None) -> None:
    """Raise ConfigError where the file that a command's `--out` names cannot be made, before what
    it is to hold is computed. None names no file.

    Leaves nothing; a folder that is missing is made by the caller, when it writes the file.
    """
    if out is None:
        return
    try:
        if out.is_dir():
            raise ConfigError(
                f"--out {out} is a folder; name the file to write, in it or elsewhere"
            )
        if out.exists() and not out.is_file():  # `whole` would put a file in its place
            raise ConfigError(f"--out {out} is a device or a pipe; name a file")
        folder = next(folder for folder in out.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
