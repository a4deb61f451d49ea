"""A run's folder of checkpoints: how they are named, found, and deleted when they are old."""

import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from train.checkpoint import checksums
from train.config import CheckpointConfig

log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8,})")
_UNFINISHED = ".unfinished"
_TEMPORARY = re.compile(r"config\.yaml\.tmp|rank_\d+\.checksums\.sha256")
"""Names of temporary files in a checkpoint that did not become whole; the second is of older
versions."""


def folder_of(run_dir: Path) -> Path:
    """Holds the checkpoints of a run."""
    return run_dir / "checkpoints"


def checkpoint_of(folder: Path, step: int) -> Path:
    """The path of the checkpoint after this many steps, whether it exists or not."""
    return folder / f"step_{step:08d}"


def unfinished(path: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return path.with_name(f"{path.name}{_UNFINISHED}")


def newest(folder: Path) -> tuple[int, Path] | None:
    """The step and folder of the newest checkpoint, whole or damaged."""
    found = finished(folder)
    return (step_of(found[-1]), found[-1]) if found else None


def finished(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or damaged. A link to one that was moved to
    another disk counts too, even where that disk is not mounted."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    found = [path for path in named if path.is_dir() or (path.is_symlink() and not path.exists())]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """How many steps a checkpoint has trained."""
    return int(path.name.removeprefix("step_"))


def rank_file(rank: int) -> str:
    """The part of a checkpoint that is for one rank alone."""
    return f"rank_{rank:05d}.pt"


def is_of_model(key: str) -> bool:
    """Whether a key of a module's state belongs to the model, and not to the library that runs it
    here.

    TransformerEngine's modules keep the state of their FP8 recipe beside the weights. A CPU has
    none, and its checkpoints must load on a GPU.
    """
    return not key.endswith("_extra_state")


def size_of(folder: Path) -> int:
    """Bytes of its files so far."""
    total = 0
    with suppress(OSError):  # one that is being renamed
        for path in folder.iterdir():
            total += path.stat().st_size
    return total


def drop_left_overs(folder: Path) -> None:
    """Delete checkpoints that never became whole."""
    for path in folder.glob(f"step_*{_UNFINISHED}"):
        is_one = path.is_dir() or path.is_symlink()
        if _NAME.fullmatch(path.name.removesuffix(_UNFINISHED)) and is_one:
            delete(path)


def drop_old(folder: Path, config: CheckpointConfig) -> None:
    """Delete the checkpoints that the config does not keep."""
    for old in finished(folder)[: -config.keep]:
        if config.keep_every and step_of(old) % config.keep_every == 0:
            continue
        try:
            # Renamed first, so that a kill in the middle leaves no half of one under its name.
            half = old.rename(unfinished(old))
        except OSError as error:  # not a failure of the new one
            log.warning("the old checkpoint %s could not be deleted: %s", old, error.strerror)
        else:
            delete(half)


def delete(path: Path) -> None:
    """Delete a checkpoint, whole or not; if it is a link to another place, only the link. Files in
    its folder that a run did not write stay there, under a new name, except for hidden files, such
    as a desktop's or a file system's."""
    try:
        if path.is_symlink():
            path.unlink()
            return
        for file in list(path.iterdir()):
            name = file.name
            ours = checksums.is_ours(name) or _TEMPORARY.fullmatch(name) or name.startswith(".")
            if ours and not file.is_dir():
                file.unlink(missing_ok=True)
        if any(path.iterdir()):
            aside = path.with_name(f"{path.name.removesuffix(_UNFINISHED)}.not_ours")
            path.rename(aside)
            log.warning("the checkpoint %s is deleted; what else was in it is in %s", path, aside)
        else:
            path.rmdir()
    except OSError as error:
        log.warning("the old checkpoint %s could not be deleted: %s", path, error.strerror)


def sync_folder(folder: Path) -> None:
    """Sync a folder's names to disk, not only its files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
