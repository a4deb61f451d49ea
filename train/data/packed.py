"""Local documents as tokens: made once, in the cache of `datasets`.

    folder, about = load_packed(text, tokenizer, config)

If several processes ask at the same time, the first makes the folder and the others wait and read
what it wrote. Its name follows from the files' names, sizes and times, the tokenizer, and the
settings. Every process first verifies its checksums, and damaged data is packed again.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
from filelock import FileLock

from train.checkpoint import checksums
from train.checkpoint.files import size_of, sync_folder
from train.checkpoint.progress import Count, said, waiting
from train.config import Config, ConfigError
from train.data import prepared
from train.data.prepare import Text, plan_of, prepare
from train.data.prepared import NAME, About
from train.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

QUIET_S = 10.0
"""Seconds between two lines that say how far the packing is."""


def load_packed(text: Text, tokenizer: Tokenizer, config: Config) -> tuple[Path, About]:
    """A folder as `train.data.prepared` reads it, from the cache or made now.

    Raises Unreadable for a broken file, and ConfigError where the cache cannot be written or read.
    """
    key = json.dumps(plan_of(text, tokenizer, config))
    folder = _cache() / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    if not folder.exists() or _damage(folder):
        with _only_one(folder):
            # Another process may have made it while this one waited.
            if folder.exists() and (damage := _damage(folder)):
                log.warning("packed data in %s is damaged (%s); it is packed again", folder, damage)
                _remove(folder)
            if not folder.exists():
                _make(folder, text, tokenizer, config)
    try:
        return folder, prepared.read(folder)
    except ConfigError as error:
        raise ConfigError(
            f"packed data in {folder} is damaged ({error}); remove that folder, and it is packed "
            "again"
        ) from None


def _cache() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "packed"


def _damage(folder: Path) -> str | None:
    """What is damaged, in a few words, or None. Reads everything."""
    try:
        names = {NAME, *checksums.read(folder)}
    except ValueError as error:
        return str(error)
    count = Count()
    with said("checking the packed data", size_of(folder), count.get, _speaks()):
        return checksums.damage_of(folder, *sorted(names), read_bytes=count.add)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ConfigError(
            f"packed data in {folder} is damaged and cannot be removed ({error.strerror}); remove "
            "that folder, and it is packed again"
        ) from None


def _speaks() -> bool:
    """One process of a machine prints for all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One process at a time; an error of the disk is a ConfigError that names HF_HOME."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        what = f"waiting for another process, which packs the data and holds {lock.lock_file}"
        with waiting(what, speaks=_speaks()):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except (OSError, NotImplementedError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ConfigError(
            f"packed data cannot be written to {folder.parent} ({reason}); set HF_HOME to a folder "
            "that can be written and has room"
        ) from None


def _make(folder: Path, text: Text, tokenizer: Tokenizer, config: Config) -> None:
    # Written under another name and then renamed: what is in the cache is whole.
    new = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(new, ignore_errors=True)
    try:
        # In this process: the ranks of a machine share its cores, and this is one of them.
        prepare(new, text, tokenizer, config, workers=1, said=_Lines())
        checksums.write(new, {path.name: checksums.hash_file(path) for path in new.iterdir()})
        sync_folder(new)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


class _Lines:
    """Reports progress now and then."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if not total or time.monotonic() - self.said < QUIET_S:
            return
        self.said = time.monotonic()
        with suppress(OSError):  # a closed terminal is not a full cache
            print(f"packing the data: {done / total:.0%} of its text", flush=True)
