"""Local documents, tokenized and packed into sequences: once, into the cache of `datasets`.

    packed = load_packed(found, column, valid_fraction, tokenizer, length)
    packed.train, packed.valid

Of several processes that ask at once, the first packs and the others wait and read what it wrote.
The cache is found by the files' names, sizes and times, the tokenizer, and what is asked of them.
Every process compares it with its checksums first, and what is damaged is packed again.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock

from train.checkpoint import checksums
from train.checkpoint.files import size_of, sync_folder
from train.checkpoint.progress import Count, said, waiting
from train.config import ConfigError
from train.data.faults import Unreadable
from train.data.files import LocalFiles
from train.data.readers import Document
from train.data.survey import Survey, documents_of, survey
from train.data.tokenizer import TOGETHER, Tokenizer

log = logging.getLogger(__name__)

PACKING = 3
"""Raise it when what is packed changes: the cache would go on serving what the old code made."""

ARROW = ("train.arrow", "valid.arrow")
FACTS = "facts.json"
CONTENTS = (*ARROW, FACTS)
"""Files of the cache, beside their checksums."""

SEQUENCES = 1024
"""Sequences that are written at once."""

QUIET_S = 10.0
"""Seconds between two lines that say how far the packing is."""


@dataclass(frozen=True)
class Facts:
    """What was read, for the start of a run and for its fingerprint."""

    documents: int
    valid_documents: int
    replaced: int
    """Documents with U+FFFD, which stands for what is no UTF-8."""
    text: str
    """A hash of all documents in their order."""


@dataclass(frozen=True)
class Packed:
    """Sequences of tokens; `valid` has none where there is a single document."""

    train: datasets.Dataset
    valid: datasets.Dataset
    facts: Facts


def load_packed(
    found: LocalFiles, column: str, valid_fraction: float, tokenizer: Tokenizer, length: int
) -> Packed:
    """The packed sequences of `length` tokens, from the cache or made now.

    Raises Unreadable for a broken file, and ConfigError where the cache cannot be written or read.
    """
    folder = _cache() / _key(found, column, valid_fraction, tokenizer, length)
    if not folder.exists() or _damage(folder):
        with _only_one(folder):
            # Another process may have made it while this one waited.
            if folder.exists() and (damage := _damage(folder)):
                log.warning("packed data in %s is damaged (%s); it is packed again", folder, damage)
                _remove(folder)
            if not folder.exists():
                _make(folder, found, column, valid_fraction, tokenizer, length)
    try:
        train, valid = (
            datasets.Dataset.from_file(str(folder / name)).with_format("numpy") for name in ARROW
        )
        facts = Facts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise ConfigError(
            f"packed data in {folder} cannot be read ({' '.join(str(error).split())}); remove "
            "that folder, and it is packed again"
        ) from None
    return Packed(train, valid, facts)


def _damage(folder: Path) -> str | None:
    """What is not as it was written, in a few words, or None. Reads everything."""
    count = Count()
    with said("checking the packed data", size_of(folder), count.get, _speaks()):
        return checksums.damage_of(folder, *CONTENTS, read_bytes=count.add)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ConfigError(
            f"packed data in {folder} is damaged and cannot be removed ({error.strerror}); remove "
            "that folder, and it is packed again"
        ) from None


def token_type(tokenizer: Tokenizer) -> str:
    """The smallest type of NumPy that holds every token, of the two that are used."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "int32"


def _cache() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "packed"


def _key(
    found: LocalFiles, column: str, valid_fraction: float, tokenizer: Tokenizer, length: int
) -> str:
    files = []
    for file in found.files:
        try:
            about = Path(file).stat()
        except OSError as error:
            raise Unreadable(f"{file}: {error.strerror}") from None
        files.append([str(Path(file).absolute()), about.st_size, about.st_mtime_ns])
    asked = [PACKING, found.kind, column, valid_fraction, tokenizer.digest, length, files]
    return hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()


def _speaks() -> bool:
    """One process of a machine speaks for all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One process at a time; what the disk refuses is a ConfigError that names HF_HOME."""
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


def _make(
    folder: Path,
    found: LocalFiles,
    column: str,
    valid_fraction: float,
    tokenizer: Tokenizer,
    length: int,
) -> None:
    about = survey(found, column, valid_fraction)
    # Beside its name and then renamed: what is in the cache is whole.
    new = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        with ExitStack() as stack:
            train, valid = (
                stack.enter_context(_Writer(new / name, length, token_type(tokenizer)))
                for name in ARROW
            )
            _write(train, valid, documents_of(found, column), about, tokenizer)
        facts = Facts(len(about.is_valid), int(about.is_valid.sum()), about.replaced, about.digest)
        checksums.write_durably(new / FACTS, json.dumps(asdict(facts)))
        checksums.write(new, {name: checksums.hash_file(new / name) for name in CONTENTS})
        sync_folder(new)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(
    train: "_Writer",
    valid: "_Writer",
    documents: Iterator[Document],
    about: Survey,
    tokenizer: Tokenizer,
) -> None:
    count = len(about.is_valid)
    sides = [train, valid]
    done, seen, said = 0, 0, time.monotonic()
    for batch in _batches(documents):
        encoded = tokenizer.encode([piece for _, piece in batch])
        for (number, piece), ids in zip(batch, encoded, strict=True):
            seen = number + 1
            if seen > count:
                break
            side = sides[int(about.is_valid[number])]
            side.add(ids if piece else np.array([tokenizer.eod]))
            done += len(piece)
        if time.monotonic() - said > QUIET_S:
            said = time.monotonic()
            with suppress(OSError):  # a terminal that is gone is no full cache
                print(f"packing the data: {done / about.characters:.0%} of its text", flush=True)
    if seen != count:
        raise Unreadable("files changed while they were read; start again")


def _batches(documents: Iterator[Document]) -> Iterator[list[tuple[int, str]]]:
    """Pieces with the number of their document, each one ended by an empty piece; about TOGETHER
    characters at a time."""
    batch: list[tuple[int, str]] = []
    size = 0
    for number, document in enumerate(documents):
        for piece in chain(document, [""]):
            batch.append((number, piece))
            size += len(piece)
            if size >= TOGETHER:
                yield batch
                batch, size = [], 0
    yield batch


class _Writer:
    """Tokens to a file of Arrow, cut into sequences; what is left over at the end is dropped."""

    def __init__(self, path: Path, length: int, dtype: str) -> None:
        self.length, self.dtype = length, dtype
        self.waiting: list[np.ndarray] = []
        self.size = 0
        kind = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), length)
        self.schema = pa.schema([("tokens", kind)])
        self.file = path.open("wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()
            self.stream.close()
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()

    def add(self, ids: np.ndarray) -> None:
        self.waiting.append(ids.astype(self.dtype))
        self.size += len(ids)
        if self.size >= SEQUENCES * self.length:
            self._flush()

    def _flush(self) -> None:
        flat = np.concatenate([np.empty(0, self.dtype), *self.waiting])
        whole = len(flat) // self.length * self.length
        column = pa.FixedSizeListArray.from_arrays(pa.array(flat[:whole]), self.length)
        self.stream.write_batch(pa.record_batch([column], schema=self.schema))
        self.waiting, self.size = [flat[whole:]], len(flat) - whole
