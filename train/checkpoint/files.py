"""A checkpoint's folder: how it is written, found, and dropped when it is old."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE

from train.checkpoint import checksums
from train.checkpoint.rng import RandomState
from train.config import CheckpointConfig, Config
from train.metrics.step import Gathered

log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})")


class OfOneRank(TypedDict):
    """What a checkpoint holds for one rank alone."""

    rng: RandomState
    metrics: Gathered | None


class HostCopy:
    """Copies of a state's tensors in the host's memory, in the same place every time.

    DCP's own stager makes new ones for every save, which takes ten times as long as the copying.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._copy: STATE_DICT_TYPE | None = None

    def __call__(self, state: STATE_DICT_TYPE) -> STATE_DICT_TYPE:
        """A copy; the one before it is gone."""
        if self._copy is None:
            self._copy = _create_cpu_state_dict(state, pin_memory=self._pinned)
        return _copy_state_dict(state, self._copy)


class Writer(dcp.FileSystemWriter):
    """DCP's writer of files, which adds ours, the checksums, and the name at the end.

    `write_data` runs on every rank and `finish` on the first one when all have written; both in
    the background. An error in either reaches every rank through DCP.
    """

    def __init__(
        self,
        final: Path,
        config: Config,
        about: dict[str, int],
        rank: int,
        own: OfOneRank,
        copy: HostCopy,
    ) -> None:
        """`about` becomes training.json, `own` is saved for this rank alone."""
        self.folder = final.with_name(f"{final.name}.unfinished")
        super().__init__(self.folder)
        self.final, self.config, self.about = final, config, about
        self.own_rank, self.own = rank, own
        self.copy = copy

    def stage(self, state_dict):
        return self.copy(state_dict)

    def write_data(self, plan, planner):
        try:
            return self._write(plan, planner)
        except RuntimeError as error:
            # torch.save reports a full disk as an error in its own book-keeping.
            raise _what_the_system_said(error) or error from None

    def _write(self, plan, planner):
        written = super().write_data(plan, planner)
        name = rank_file(self.own_rank)
        with (self.folder / name).open("wb") as file:
            torch.save(self.own, file)
            file.flush()
            os.fsync(file.fileno())
        files = {result.storage_data.relative_path for result in written.value()}
        checksums.write_part(self.folder, f"rank_{self.own_rank}", {name, *files})
        return written

    def finish(self, metadata, results) -> None:
        super().finish(metadata, results)
        self.config.save(self.folder / "config.yaml")
        checksums.write_durably(
            self.folder / "training.json", json.dumps(self.about, indent=2) + "\n"
        )
        checksums.write(self.folder)
        _sync(self.folder)
        self.folder.rename(self.final)
        _sync(self.final.parent)
        _drop_old(self.final.parent, self.config.checkpoint)


def newest(folder: Path) -> tuple[int, Path] | None:
    """The step and folder of the newest checkpoint, whole or damaged."""
    found = finished(folder)
    return (step_of(found[-1]), found[-1]) if found else None


def finished(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or damaged."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """How many steps a checkpoint has trained."""
    return int(path.name.removeprefix("step_"))


def rank_file(rank: int) -> str:
    """What a rank alone needs of a checkpoint."""
    return f"rank_{rank:05d}.pt"


def _drop_old(folder: Path, config: CheckpointConfig) -> None:
    for old in finished(folder)[: -config.keep]:
        if config.keep_every and step_of(old) % config.keep_every == 0:
            continue
        try:
            # Renamed first, so that a kill in the middle leaves no half of one under its name.
            shutil.rmtree(old.rename(folder / f"{old.name}.unfinished"))
        except OSError as error:  # no reason to call the new one a failure
            log.warning("the old checkpoint %s could not be deleted: %s", old, error.strerror)


def _sync(folder: Path) -> None:
    """Have a folder's names on disk, not only its files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _what_the_system_said(error: BaseException | None) -> OSError | None:
    """The error of the operating system that led to this one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
