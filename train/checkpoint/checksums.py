"""SHA-256 of every file of a checkpoint, in the format of `sha256sum`.

    cd runs/<name>/checkpoints/step_00000200 && sha256sum -c checksums.sha256

A file is hashed while it is written: reading it again would take as long again. Only files that a
run writes count. Anything else in the folder, such as `.DS_Store`, `.nfs...` or an export, is
ignored.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

NAME = "checksums.sha256"
METADATA, CONFIG, ABOUT = ".metadata", "config.yaml", "training.json"
REQUIRED = (METADATA, CONFIG, ABOUT)
"""Every checkpoint has these, beside the files of its ranks."""

EMPTY = hashlib.sha256().hexdigest()
"""Checksum of an empty file, which a power cut leaves of one that was not synced."""

_OURS = re.compile(r"\.metadata|config\.yaml|training\.json|__\d+_\d+\.distcp|rank_\d+\.pt")
_LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)")
MOST_THREADS = 8
"""Most threads of one rank: more make no disk faster."""
_CHUNK = 1 << 24
"""Bytes read and hashed at a time."""
_WRITE_CHUNK = 1 << 26
"""Bytes written and hashed at a time; larger, since two threads wait for each other after each."""
_WORTH_A_THREAD = 1 << 20


class HashingStream:
    """A file that is written from its beginning to its end, hashed meanwhile, and on disk when it
    is closed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        """Bytes so far."""
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), _WRITE_CHUNK):
            chunk = view[begin : begin + _WRITE_CHUNK]
            if len(chunk) < _WORTH_A_THREAD:
                self._hash.update(chunk)
                self._file.write(chunk)
            else:  # both release Python's lock
                hashing = self._thread.submit(self._hash.update, chunk)
                try:
                    self._file.write(chunk)
                finally:
                    hashing.result()  # the caller owns the memory
            self.size += len(chunk)
        return len(view)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._thread.shutdown()
        if not self._file.closed:
            self._file.flush()  # DCP syncs what may still be in memory
            os.fsync(self._file.fileno())
            self._file.close()

    def hexdigest(self) -> str:
        """SHA-256 of all that was written."""
        return self._hash.hexdigest()


def is_ours(name: str) -> bool:
    """Whether a run writes files of this name into a checkpoint."""
    return name == NAME or _OURS.fullmatch(name) is not None


def write(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the list of the folder: checksums by file name."""
    write_durably(folder / NAME, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def read(folder: Path) -> dict[str, str]:
    """Checksums by file name. Raises ValueError, in a few words, where there are none."""
    if not folder.exists():
        raise ValueError("a link to nothing" if folder.is_symlink() else "no such folder")
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{NAME} cannot be read") from None
    if not lines:
        raise ValueError(f"{NAME} is empty")
    wanted: dict[str, str] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{NAME} is not a list of checksums")
        wanted[match[2]] = match[1]
    return wanted


def damage(
    folder: Path, share: int = 0, shares: int = 1, read_bytes: Callable[[int], None] | None = None
) -> str | None:
    """What is wrong with the folder, in a few words, or None.

    Hashing takes long, so `shares` ranks can divide the files among them. `read_bytes` is called
    with the bytes read since its last call.
    """
    try:
        wanted = read(folder)
        there = {path.name for path in folder.iterdir()}
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{folder.name}: {error.strerror}"
    for name in sorted(wanted.keys() - there):
        return f"{name} is missing"
    # A list that was cut off at the end of a line names too few.
    ours = {name for name in there if is_ours(name)} - {NAME}
    for name in sorted({*REQUIRED, *ours} - wanted.keys()):
        return f"{name} is not in {NAME}"
    names = sorted(wanted)[share::shares]
    with ThreadPoolExecutor(threads(len(names))) as pool:
        problems = pool.map(lambda name: _damage_of(folder, name, wanted[name], read_bytes), names)
        return next(filter(None, problems), None)


def damage_of(
    folder: Path, *names: str, read_bytes: Callable[[int], None] | None = None
) -> str | None:
    """What is wrong with these files of the folder alone, in a few words, or None."""
    try:
        wanted = read(folder)
    except ValueError as error:
        return str(error)
    for name in names:
        if name not in wanted:
            return f"{name} is not in {NAME}"
        if (problem := _damage_of(folder, name, wanted[name], read_bytes)) is not None:
            return problem
    return None


def hash_file(path: Path, read_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        # Of a small file no larger a buffer, which Python would fill with zeros first.
        buffer = bytearray(min(max(os.fstat(file.fileno()).st_size, 1), _CHUNK))
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            found.update(view[:count])
            if read_bytes is not None:
                read_bytes(count)
    return found.hexdigest()


def threads(most: int) -> int:
    """How many threads of this rank may hash or write at once, of `most` that have work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(most, (cores or 1) // ranks, MOST_THREADS))


def write_durably(path: Path, text: str) -> None:
    """Write a file so that it survives a power cut after this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _damage_of(
    folder: Path, name: str, want: str, read_bytes: Callable[[int], None] | None = None
) -> str | None:
    try:
        found = hash_file(folder / name, read_bytes)
    except OSError as error:
        return f"{name}: {error.strerror}"
    if found == want:
        return None
    return f"{name} is {'empty' if found == EMPTY else 'not what was written'}"
