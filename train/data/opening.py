"""Files opened for reading, decompressed by what they hold and not by what they are called."""

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
except ImportError:  # said where a file needs it
    zstd = None  # type: ignore[assignment]

SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4", ".zip")
"""What a compressed file's name may end with, after the suffix that tells its kind."""

GIT_LFS = b"version https://git-lfs.github.com/spec/"
"""How the file begins that Git leaves in the place of a large one."""

NOT_SUPPORTED = {
    b"PK\x03\x04": "a zip archive",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x1f\x9d": "compressed with compress",
}
"""How files begin that are to be unpacked first."""


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
    begin = file.read(len(GIT_LFS))
    file.seek(0)
    if begin == GIT_LFS:
        raise Unreadable(f"{path} is a pointer of Git LFS, not the data; run git lfs pull")
    for magic, what in NOT_SUPPORTED.items():
        if begin.startswith(magic):
            raise Unreadable(f"{path} is {what}, which is not supported; unpack it first")
    for magic, opener in _OPENERS.items():
        if begin.startswith(magic):
            return opener(file)
    return file


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
