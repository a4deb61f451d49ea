"""Which files `data.path` means, and of which kind they are: text, json, parquet or arrow.

A suffix that is known tells the kind; a file without one that was named explicitly is classified by
its content. Of a folder only files with known suffixes are read. A folder that `save_to_disk`
wrote, or that was downloaded from the hub, holds more than data: the start of a run says what is
left out.
"""

import glob
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from train.config import ConfigError
from train.data.faults import Unreadable
from train.data.opening import READ_ERRORS, SUFFIXES, is_archive, open_file
from train.data.readers import CONVERT

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
}
"""By suffix, in upper or lower case, followed by that of a compression or not."""

NOT_CORPUS = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that hold no library source."""

ABOUT_DATA = {"readme", "license", "licence", "changelog", "citation", "notice", "contributing"}
"""Names of text files, without their suffix, that accompany data and are not data."""

METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""JSON files that the `datasets` library writes beside data."""

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the names of files and folders, and the split they mean on the hub."""

TABLES = (".csv", ".tsv")
"""Suffixes of tables that are not read here: as text they would be trained on with their commas."""

UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")
"""Suffixes that a download has until it is whole."""

HEAD = 1 << 16
"""Bytes of a file by which its content is classified."""

MOST_REPLACED = 0.1
"""Share of a text's characters that may be invalid UTF-8: Latin-1 has fewer, others more."""

MOST_NULS = 0.001
"""Share of a text's characters that may be NUL: UTF-16 has half, binary files about 1/256."""


@dataclass(frozen=True)
class LocalFiles:
    """Files of one kind, sorted."""

    kind: str
    files: tuple[str, ...]
    left_out: str = ""
    """What else was found in a folder and is not read, in words."""


def find_files(path: str | None, split: str = "train") -> LocalFiles:
    """The files of a path: a file, a folder, a glob, or None for Python's standard library.

    Raises ConfigError.
    """
    if path is None:
        files = _standard_library()
        if not files:
            raise ConfigError("data.path=null: this Python has no library source; set data.path")
        return LocalFiles("text", tuple(map(str, files)))
    found = Path(path).expanduser()
    if found.is_dir():
        return _in_folder(path, found, split)
    names = [str(found)] if os.path.lexists(found) else glob.glob(str(found), recursive=True)
    files = _distinct(p for p in map(Path, names) if p.is_file())
    if not files:
        what = "no such file"
        if os.path.lexists(found):
            what = "a link to nothing" if found.is_symlink() else "neither a file nor a folder"
        raise ConfigError(f"data.path={path}: {what}; name a file, a folder or a glob")
    return _of_one_kind(path, {p: _kind_of_named(path, p) for p in files})


def _kind_of_named(path: str, file: Path) -> str:
    """By its name, or else by its content; a .txt by both. Raises ConfigError."""
    if _suffix(file) in TABLES:
        raise ConfigError(
            f"data.path={path}: {file.name} is a table, which is not read; write its text as JSON "
            "lines or Parquet, with data.text_column as the name"
        )
    kind = kind_of(file)
    if kind is None:
        return judge(file)
    if file.suffix.lower() == ".txt" and judge(file) == "json":
        raise ConfigError(
            f"data.path={path}: {file.name} holds JSON; rename it to end in .jsonl, by which it is "
            "read as that"
        )
    return kind


def _suffix(path: Path | str) -> str:
    """A file's suffix in lower case, without that of a compression."""
    name = Path(path).name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def kind_of(path: Path | str) -> str | None:
    """The kind that a file's name tells, if it tells one."""
    return KINDS.get(_suffix(path))


def judge(path: Path) -> str:
    """The kind that a file's content tells. Raises ConfigError where it is not text."""
    try:
        with open_file(str(path)) as file:
            head = file.read(HEAD)
    except Unreadable as error:
        raise ConfigError(f"data.path: {error}") from None
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"data.path: {path} cannot be read: {reason}") from None
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1"):
        return "arrow"
    text = head.decode("utf-8", "replace")
    reason = too_strange(len(text), text.count("\ufffd"), text.count("\0"), head[:2])
    if reason:
        raise ConfigError(
            f"data.path: {path} is not text: {reason}; known files are {', '.join(KINDS)}"
        )
    return "json" if _is_json(text) else "text"


def too_strange(characters: int, replaced: int, nuls: int, begin: bytes = b"") -> str | None:
    """Why a file with this many characters that are U+FFFD or NUL is not text, or None."""
    if begin in (b"\xff\xfe", b"\xfe\xff"):
        return f"it is UTF-16; {CONVERT}"
    if nuls > MOST_NULS * characters:
        return "it holds NUL bytes, as binary files and UTF-16 do"
    if replaced > MOST_REPLACED * characters:
        return (
            f"{replaced / characters:.0%} of its characters are not UTF-8; convert it, for example "
            "with iconv -f WINDOWS-1251 -t UTF-8"
        )
    return None


def _is_json(head: str) -> bool:
    line = head.lstrip("\ufeff \t\r\n").partition("\n")[0]
    for part in (line, head):
        if part[:1] in ("{", "["):
            try:
                value = json.loads(part)
            except (ValueError, RecursionError):
                continue
            return isinstance(value, dict) or (bool(value) and isinstance(value[0], dict))
    return False


def _in_folder(path: str, folder: Path, split: str) -> LocalFiles:
    if (folder / "dataset_dict.json").is_file():
        return _saved_dict(path, folder, split)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved(path, folder)
    try:
        there = _walk(folder)
    except OSError as error:
        raise ConfigError(f"data.path={path}: {error.filename}: {error.strerror}") from None
    kinds = {file: kind for file in there if (kind := kind_of(file))}
    unread = [file.name for file in there if file not in kinds]
    for name in unread:
        if name.lower().endswith(UNFINISHED):
            raise ConfigError(
                f"data.path={path}: {name} is an unfinished download; finish it, or remove it"
            )
    if not kinds and (archives := list(filter(is_archive, unread))):
        raise ConfigError(
            f"data.path={path}: {archives[0]} is an archive, which is not supported, and nothing "
            "in this folder is read; unpack it first"
        )
    if not kinds:
        raise ConfigError(
            f"data.path={path}: no {', '.join(KINDS)} file in this folder; name a file or a glob"
        )
    if unread and all(_is_about_data(file) for file in kinds):
        raise ConfigError(
            f"data.path={path}: beside {next(iter(kinds)).name} nothing in this folder is read, "
            f"{unread[0]} neither; known files are {', '.join(KINDS)}"
        )
    for file in kinds:
        if not file.exists():
            raise ConfigError(
                f"data.path={path}: {file} is a link to nothing, as an unfinished download "
                "leaves; download it again, or remove the link"
            )
    data = _without_what_is_about_it(kinds)
    names = sorted([*(file.name for file in kinds.keys() - data.keys()), *unread])
    notes = [", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")]
    if set(data.values()) != {"text"}:
        data, note = _of_split(path, folder, data, split)
        notes.append(note)
    found = _of_one_kind(path, data)
    return LocalFiles(found.kind, found.files, ", ".join(filter(None, notes)))


def _without_what_is_about_it(kinds: dict[Path, str]) -> dict[Path, str]:
    """Only the data of a folder: Parquet and Arrow win over texts and .json files beside them, and
    JSON over texts that only describe it."""
    data = {file: kind for file, kind in kinds.items() if file.name not in METADATA}
    if {"parquet", "arrow"} & set(data.values()):
        suffixes = {file: file.suffix.lower() for file in data}
        return {f: k for f, k in data.items() if k != "text" and suffixes[f] != ".json"}
    if "json" in data.values():
        return {f: k for f, k in data.items() if k == "json" or not _is_about_data(f)}
    return data or kinds


def _is_about_data(file: Path) -> bool:
    return file.name.partition(".")[0].lower() in ABOUT_DATA


def _of_split(
    path: str, folder: Path, kinds: dict[Path, str], split: str
) -> tuple[dict[Path, str], str]:
    """The files of a split, with those of no split; and how many of other splits are left out."""
    splits = {file: split_of(file.relative_to(folder)) for file in kinds}
    known = {*SPLITS.values()}
    wanted = {split, None}
    if split == "train" and split not in splits.values():
        wanted |= {*splits.values()} - known  # shards called part, and the like
    if not {*splits.values()} & wanted or (split != "train" and split not in splits.values()):
        there = ", ".join(sorted({one for one in splits.values() if one})) or "none"
        raise ConfigError(
            f"data.split={split} is not in data.path={path}; the splits its files are named "
            f"after: {there}"
        )
    others = Counter(one for one in splits.values() if one not in wanted)
    note = ", ".join(f"{n} file(s) of split {one}" for one, n in sorted(others.items()))
    return {file: kind for file, kind in kinds.items() if splits[file] in wanted}, note


def split_of(path: Path) -> str | None:
    """The split that a file's name or its folders' names tell, as on the hub; the name first."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    shard = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}\..*", path.name)
    return shard[1] if shard else None


def _saved(path: str, folder: Path) -> LocalFiles:
    """A data set that `save_to_disk` wrote."""
    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / part["filename"] for part in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"data.path={path}: {folder / 'state.json'} is not what save_to_disk writes; save the "
            "data set again, or name its files with a glob"
        ) from None
    for file in files:
        if not file.is_file():
            raise ConfigError(f"data.path={path}: {file} is missing; save the data set again")
    return LocalFiles("arrow", tuple(map(str, files)))


def _saved_dict(path: str, folder: Path, split: str) -> LocalFiles:
    """The splits that `save_to_disk` wrote, each a folder."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        splits = []
    if split not in splits:
        raise ConfigError(
            f"data.split={split} is not in data.path={path}; its splits: "
            f"{', '.join(map(str, splits)) or 'none'}"
        )
    found = _saved(path, folder / split)
    others = ", ".join(f"split {one}" for one in splits if one != split)
    return LocalFiles(found.kind, found.files, others)


def _of_one_kind(path: str, kinds: dict[Path, str]) -> LocalFiles:
    found = sorted(set(kinds.values()))
    if len(found) > 1:
        raise ConfigError(
            f"data.path={path} mixes {' and '.join(found)} files; name one kind with a glob, "
            "such as 'folder/**/*.jsonl'"
        )
    return LocalFiles(found[0], tuple(sorted(map(str, kinds))))


def _walk(folder: Path) -> list[Path]:
    """Files below a folder, through links, each once; hidden ones are ignored."""
    found: list[Path] = []
    seen: set[str] = set()
    for where, inner, names in os.walk(folder, onerror=_raise, followlinks=True):
        # In order, since of two links to one folder only the first is followed.
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if os.path.realpath(where) in seen:  # a link back up, or a second one to the same place
            inner.clear()
            continue
        seen.add(os.path.realpath(where))
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return _distinct(file for file in found if file.is_file() or file.is_symlink())


def _raise(error: OSError) -> None:
    raise error


def _distinct(files: Iterable[Path]) -> list[Path]:
    """Sorted, and each file once, whatever links lead to it."""
    return list({os.path.realpath(file): file for file in sorted(files, reverse=True)}.values())


def _standard_library() -> list[Path]:
    files: list[Path] = []
    for folder, inner, names in os.walk(sysconfig.get_paths()["stdlib"]):
        inner[:] = [name for name in inner if name not in NOT_CORPUS]  # do not even walk those
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)
