"""Opens files for reading, decompressed by their content and not by their name."""

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from pyarrow import ArrowException

from train.data.faults import Unreadable

try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        import backports.zstd as zstd
except ImportError:  # reported where a file needs it
    zstd = None  # type: ignore[assignment]

SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4", ".zip")
"""What a compressed file's name may end with, after the suffix that tells its kind."""

GIT_LFS = b"version https://git-lfs.github.com/spec/"
"""First bytes of the pointer that Git LFS leaves instead of a large file."""

NOT_SUPPORTED = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"\x04\x22\x4d\x18": "data compressed with lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x1f\x9d": "data compressed with compress",
}
"""First bytes of files that have to be unpacked first."""

ARCHIVES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".zip", ".7z", ".rar")
"""Suffixes of archives, a tar's followed by that of a compression or not."""

TAR, TAR_AT = b"ustar", 257
"""What a tar archive holds at this byte."""


READ_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, ArrowException, zlib.error, lzma.LZMAError),
    *((zstd.ZstdError,) if zstd else ()),
)
"""What reading raises for a file that is broken; decompressors share no class of errors."""


def open_file(path: str) -> BinaryIO:
    """The bytes of a local file or of a URL that fsspec knows. Raises Unreadable, OSError."""
    if "://" in path:
        from datasets.utils.file_utils import xopen  # with its retries and the hub's token

        file = xopen(path, "rb")
    else:
        file = open(path, "rb")  # noqa: SIM115  # the caller closes it
    begin = _begin(file)
    if begin.startswith(GIT_LFS):
        raise Unreadable(f"{path} is a pointer of Git LFS, not the data; run git lfs pull")
    _refuse(path, begin, "is")
    opener = _opener(begin)
    if opener is None:
        return file
    inner = opener(file)
    begin = _begin(inner)
    _refuse(path, begin, "is compressed and holds")
    if _opener(begin) is not None:
        raise Unreadable(
            f"{path} is compressed twice; decompress it once, for example with gunzip, bunzip2, "
            "unxz or unzstd"
        )
    return inner


def is_archive(name: str) -> bool:
    """Whether a file's name says that it is an archive of files."""
    name = name.lower()
    return name.endswith((*ARCHIVES, *(f".tar{suffix}" for suffix in SUFFIXES)))


def _begin(file: BinaryIO) -> bytes:
    begin = file.read(TAR_AT + len(TAR))
    file.seek(0)
    return begin


def _refuse(path: str, begin: bytes, verb: str) -> None:
    what = next((what for magic, what in NOT_SUPPORTED.items() if begin.startswith(magic)), None)
    if begin[TAR_AT:] == TAR:
        what = "a tar archive"
    if what is not None:
        raise Unreadable(f"{path} {verb} {what}, which is not supported; unpack it first")


def _opener(begin: bytes) -> Callable[[Any], Any] | None:
    return next((opener for magic, opener in _OPENERS.items() if begin.startswith(magic)), None)


def _open_zstd(file: BinaryIO) -> Any:
    if zstd is None:
        raise Unreadable(
            f"{file.name} is compressed with zstd, which takes a package that is not here; "
            "pip install backports.zstd"
        )
    return zstd.ZstdFile(file)


_OPENERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
"""By how such a file begins."""
