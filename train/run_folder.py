"""Checks a run's folder before anything is written into it; one line names what is in the way."""

import errno
import os
import stat
from pathlib import Path

from train.checkpoint import run_lock
from train.checkpoint.files import folder_of
from train.config import ConfigError

FILES = (
    *("config.yaml", "environment.json", "metrics.jsonl", "routing.jsonl", "changes.jsonl"),
    run_lock.NAME,
)
FOLDERS = ("stalled",)
"""What a run writes there, in addition to its checkpoints."""


def check(run_dir: Path) -> None:
    """Raise ConfigError where `run_dir`, or what a run keeps in it, cannot be used.

    Any of them may be a link, to another disk for example: a checkpoint is written and renamed
    inside its own folder.
    """
    for folder in (*reversed(run_dir.parents), run_dir, folder_of(run_dir)):
        _check(folder, is_folder=True)
    for name in (*FILES, *FOLDERS):
        _check(run_dir / name, is_folder=name in FOLDERS)
    for folder in (run_dir, folder_of(run_dir)):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{folder} cannot be written here; {_OTHERWISE}")


def make(run_dir: Path) -> None:
    """Make the folder if it is not there. Raises ConfigError."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={run_dir.parent}: {error.strerror}; {_OTHERWISE}") from None


_OTHERWISE = "make that possible, or choose another run.dir or run.name"


def _check(path: Path, is_folder: bool) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ENOENT and not path.is_symlink():
            return  # it will be made
        reason = "a link to nothing" if error.errno == errno.ENOENT else error.strerror
        raise ConfigError(f"{path}: {reason}; {_OTHERWISE}") from None
    if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
        kind = "folder" if is_folder else "file"
        raise ConfigError(
            f"{path} is not a {kind}, and a run has a {kind} there; move it away, or choose "
            "another run.dir or run.name"
        )
