"""How a checkpoint gets on disk: DCP's file writer, plus our files, checksums and name."""

import json
import os
import socket
import time
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from io import IOBase
from pathlib import Path
from typing import IO, BinaryIO, TypedDict, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.storage import WriteResult

from train.checkpoint import checksums
from train.checkpoint.files import drop_old, rank_file, sync_folder, unfinished
from train.checkpoint.host_copy import HostCopy
from train.checkpoint.rng import RandomState
from train.config import Config
from train.metrics.step import Gathered

BYTES_PER_FILE = 1 << 28
"""A rank with more than this writes several files at once."""

VISIBLE_S = 30.0
"""How long a file that another node has written may take to appear here: NFS caches the content of
a folder for some seconds."""


class OfOneRank(TypedDict):
    """What a checkpoint holds for one rank alone."""

    rng: RandomState
    metrics: Gathered | None


class Written(list[WriteResult]):
    """What a rank has written, as DCP hands it to the first rank, and its files."""

    sums: dict[str, str]
    """SHA-256 by file name."""
    sizes: dict[str, int]
    """Bytes by file name."""


class Writer(dcp.FileSystemWriter):
    """DCP's file writer, which adds our files, the checksums, and the name at the end.

    `write_data` runs on every rank and `finish` on the first one when all have written; both in
    the background. An error in either reaches every rank through DCP.
    """

    def __init__(
        self,
        final: Path,
        config: Config,
        about: Mapping[str, object],
        rank: int,
        own: OfOneRank,
        copy: HostCopy | None,
        size: int = 0,
    ) -> None:
        """`about` becomes training.json, `own` is saved for this rank alone, and `size` is about
        what the rank writes, in bytes. Without `copy` the state is written in place, and must not
        change until that is done."""
        self.folder = unfinished(final)
        threads = checksums.threads(1 + size // BYTES_PER_FILE)
        super().__init__(self.folder, thread_count=threads)
        self.fs = self.hashing = HashingFileSystem()
        self.final, self.config, self.about = final, config, about
        self.own_rank, self.own = rank, own
        self.copy = copy

    def stage(self, state_dict):
        return state_dict if self.copy is None else self.copy.begin(state_dict)

    def write_data(self, plan, planner):
        with _without_crc32():
            written = super().write_data(plan, planner)
        with self.hashing.create_stream(self.folder / rank_file(self.own_rank), "wb") as file:
            torch.save(self.own, cast(IO[bytes], file))
        self.hashing.raise_error()
        mine = Written(written.value())
        mine.sums, mine.sizes = dict(self.hashing.sums), dict(self.hashing.sizes)
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(mine)
        return done

    def finish(self, metadata, results: list[list[WriteResult]]) -> None:
        try:
            super().finish(metadata, results)
        finally:
            self.hashing.raise_error()  # rather than its consequences
        self.config.save(self.folder / checksums.CONFIG)
        text = json.dumps(dict(self.about), indent=2) + "\n"
        checksums.write_durably(self.folder / checksums.ABOUT, text)
        sums = {name: checksums.hash_file(self.folder / name) for name in checksums.REQUIRED}
        for rank, written in enumerate(results):
            assert isinstance(written, Written)
            _wait_for_files(self.folder, rank, written.sizes)
            sums |= written.sums
        for path in self.folder.iterdir():  # of a save that was cut short
            if checksums.is_ours(path.name) and path.name not in sums:
                path.unlink()
        checksums.write(self.folder, sums)
        sync_folder(self.folder)
        self.folder.rename(self.final)
        sync_folder(self.final.parent)
        drop_old(self.final.parent, self.config.checkpoint)


class HashingFileSystem(FileSystem):
    """Hashes what is written, and keeps the first error, which DCP's threads would lose."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.error: Exception | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        path = Path(path)
        try:
            with self._open(path) as file, closing(checksums.HashingStream(file)) as hashing:
                yield cast(IOBase, hashing)
            self.sums[path.name], self.sizes[path.name] = hashing.hexdigest(), hashing.size
        except Exception as error:
            self.error = self.error or error

    def _open(self, path: Path) -> BinaryIO:
        try:
            return path.open("wb")
        except OSError as error:
            self.error = self.error or error
            return Path(os.devnull).open("wb")  # for DCP, which does not know yet

    def raise_error(self) -> None:
        """Raise what kept a file from being written, if anything did."""
        if self.error is not None:
            # torch.save reports a full disk as an internal error.
            raise _what_the_system_said(self.error) or self.error from None


@contextmanager
def _without_crc32() -> Generator[None, None, None]:
    """Make torch.save skip its own checksum of each tensor, which takes half as long as ours."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _wait_for_files(folder: Path, rank: int, sizes: Mapping[str, int]) -> None:
    """Wait until the files that a rank has written are visible here. Raises OSError."""
    deadline = time.monotonic() + VISIBLE_S
    for name, size in sizes.items():
        while not _has(folder / name, size):
            if time.monotonic() > deadline:
                raise OSError(
                    f"{name}, which rank {rank} has written, is not in {folder} as "
                    f"{socket.gethostname()} sees it; run.dir must be a folder that all nodes share"
                )
            time.sleep(0.1)


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _what_the_system_said(error: BaseException | None) -> OSError | None:
    """The operating system's error that led to this one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
