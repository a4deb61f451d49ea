"""SHA-256 of every file of a folder, in the format of `sha256sum`.

Each rank hashes the files it wrote, the first one puts the lists together:

    cd runs/<name>/checkpoints/step_00000200 && sha256sum -c checksums.sha256
"""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

NAME = "checksums.sha256"

_LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)")


def write_part(folder: Path, part: str, files: Iterable[str]) -> None:
    """Hash `files` of the folder into a list that `write` will include."""
    lines = [f"{_hash(folder / name)}  {name}\n" for name in sorted(files)]
    write_durably(folder / f"{part}.{NAME}", "".join(lines))


def write(folder: Path) -> None:
    """Make the folder's list from the parts, and of the files that no part names."""
    lines: dict[str, str] = {}
    parts = sorted(folder.glob(f"*.{NAME}"))
    for part in parts:
        lines |= {line.split("  ")[1]: line for line in part.read_text().splitlines()}
        part.unlink()
    for path in folder.iterdir():
        if path.name not in lines:
            lines[path.name] = f"{_hash(path)}  {path.name}"
    write_durably(folder / NAME, "".join(f"{lines[name]}\n" for name in sorted(lines)))


def damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with the folder, in a few words, or None.

    Hashing takes long, so `shares` ranks can divide the files among them.
    """
    try:
        lines = (folder / NAME).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return f"{NAME} cannot be read"
    wanted: dict[str, str] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            return f"{NAME} is not a list of checksums"
        wanted[match[2]] = match[1]
    # A list that was cut off at the end of a line names too few.
    found = {path.name for path in folder.iterdir()} - {NAME}
    for name in sorted(found ^ wanted.keys()):
        return f"{name} is missing" if name in wanted else f"{name} is not in {NAME}"
    for name in sorted(wanted)[share::shares]:
        try:
            if _hash(folder / name) != wanted[name]:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def write_durably(path: Path, text: str) -> None:
    """Write a file so that it survives a power cut after this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
