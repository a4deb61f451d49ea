"""A folder of tokens that were made of text once: what is in it, and whether it can be read.

    prepared.json               what was read, how, and how much it gave
    train-00003-000.arrow       tokens of documents to train on: unit 3 of the text, its part 0
    valid-00003-000.arrow       those of documents held out
    tokenizer.json              where tokens are not bytes, with tokenizer_config.json
    unfinished/                 while it is being made, by `train.data.prepare`

All parts of a side, in order of their names, are one stream, which `train.data.tokens` cuts into
sequences of any length.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import NonNegativeInt, ValidationError

from models.config import Section
from train.checkpoint.checksums import write_durably
from train.checkpoint.files import sync_folder
from train.config import Config, ConfigError
from train.data.tokenizer import Tokenizer
from train.data.tokens import Sequences

NAME = "prepared.json"
UNFINISHED = "unfinished"
PLAN = "plan.json"
"""A file in `unfinished`: what the folder is to hold."""

VERSION = 3
"""Increase it when what is prepared changes: the cache would keep serving what the old code made,
and folders would be taken for what they are not."""

SIDES = ("train", "valid")


class About(Section):
    """What prepared.json says."""

    version: int
    source: str
    """What was read, in words."""
    text_column: str
    split: str
    valid_fraction: float
    tokenizer: str
    """Its name, as it was given."""
    tokenizer_digest: str
    vocab_size: NonNegativeInt
    documents: NonNegativeInt
    valid_documents: NonNegativeInt
    replaced: NonNegativeInt
    """Documents with U+FFFD, which stands for what is not UTF-8."""
    copies: NonNegativeInt
    """Documents whose text an earlier one has; they are on its side."""
    characters: NonNegativeInt
    text: str
    """A hash of all documents in their order."""
    files: dict[str, tuple[NonNegativeInt, NonNegativeInt]]
    """Bytes and tokens of each file with tokens."""
    made_of: dict[str, Any]
    """What determines the bytes of the folder, with a hash of the input files' names, sizes and
    times."""

    def tokens(self, side: str) -> int:
        return sum(tokens for name, (_, tokens) in self.files.items() if name.startswith(side))


def is_prepared(path: str | Path | None) -> bool:
    """Whether a path is a folder of tokens, whole or not. Raises ConfigError where that cannot be
    known, as of a folder of somebody else."""
    if path is None:
        return False
    folder = folder_of(path)
    try:
        return (folder / NAME).is_file() or (folder / UNFINISHED / PLAN).is_file()
    except OSError as error:
        raise ConfigError(f"data.path={path}: {error.strerror}") from None


def folder_of(path: str | Path | None) -> Path:
    """The folder that `data.path` names."""
    assert path is not None
    return Path(path).expanduser()


def read(folder: Path) -> About:
    """What a folder holds, after checking that all of it is there. Raises ConfigError that says
    what is wrong."""
    if not (folder / NAME).is_file():
        raise ConfigError(
            f"{folder} was not prepared to its end; give the same python -m scripts.prepare_data "
            "again, which continues where it stopped"
        )
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        version = json.loads(text)["version"]
        if version == VERSION:
            about = About.model_validate_json(text)
    except ValidationError as error:
        (first, *_) = error.errors()
        where = ".".join(str(part) for part in first["loc"])
        raise _not_ours(folder, f"{where}: {first['msg']}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _not_ours(folder, " ".join(str(error).split()) or type(error).__name__) from None
    if version != VERSION:
        raise ConfigError(
            f"{folder} was prepared by another version of this code ({version}, this one reads "
            f"{VERSION}); prepare the text again in another folder"
        )
    for name, (size, _) in about.files.items():
        try:
            there = (folder / Path(name).name).stat().st_size  # never one outside
        except OSError as error:
            raise damaged(folder, f"{name}: {error.strerror}") from None
        if there != size:
            raise damaged(folder, f"{name} has {there:,} bytes, not {size:,}")
    return about


def write(folder: Path, about: About) -> None:
    """Written last: a folder that has it is whole. Raises OSError."""
    new = folder / f"{NAME}.unfinished"
    write_durably(new, about.model_dump_json(indent=1) + "\n")
    new.replace(folder / NAME)
    sync_folder(folder)


def sequences(folder: Path, about: About, length: int) -> tuple[Sequences, Sequences]:
    """Those to train on and those held out. Raises ConfigError."""
    try:
        names = {side: [n for n in sorted(about.files) if n.startswith(side)] for side in SIDES}
        train, valid = (
            Sequences(length, [folder / Path(name).name for name in names[side]]) for side in SIDES
        )
        if (train.tokens, valid.tokens) != (about.tokens("train"), about.tokens("valid")):
            raise ValueError("another number of tokens than it says")
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise damaged(folder, " ".join(str(error).split())) from None
    return train, valid


def _not_ours(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{folder / NAME} is not what prepare_data writes ({why}); prepare the text again in "
        "another folder, or give that file another name where the folder is text"
    )


def damaged(folder: Path, what: str) -> ConfigError:
    """The error of a damaged folder."""
    return ConfigError(f"{folder} is damaged: {what}; remove that folder and make it again")


def check_keys(path: str, about: About, config: Config, tokenizer: Tokenizer | None) -> None:
    """Raise ConfigError where the config asks for other tokens than a folder holds.

    A key that only says which part of the text is read may be left at its default.
    """
    data = config.data
    if tokenizer is not None and tokenizer.digest != about.tokenizer_digest:
        right = "bytes" if about.tokenizer_digest == "bytes" else path
        raise ConfigError(
            f"data.tokenizer={data.tokenizer} is not what {path} was prepared with, "
            f"{about.tokenizer} with {about.vocab_size:,} tokens; set data.tokenizer={right} "
            "and leave data.eod_token out, or prepare the text again"
        )
    if data.valid_fraction != about.valid_fraction:
        raise ConfigError(
            f"data.valid_fraction={data.valid_fraction}, and {path} was prepared with "
            f"{about.valid_fraction}; set it to that, or prepare the text again"
        )
    for key in ("text_column", "split"):
        value, there = getattr(data, key), getattr(about, key)
        if value not in (type(data).model_fields[key].default, there):
            raise ConfigError(
                f"data.{key}={value}, and {path} was prepared with {there}; leave it out, or "
                "prepare the text again"
            )
