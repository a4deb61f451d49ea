"""Make a folder of tokens of text, by several processes, in as many starts as it takes.

    prepare(folder, text, tokenizer, config, workers=8, said=print)

The text is in units, such as a few files, each read by one process from start to finish. The result
of a unit is a file, so a new start skips the units that are done, and ends with the same bytes:
neither the number of processes nor where one was killed matters. `train.data.prepared` says what is
in the folder.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from train.checkpoint.checksums import write_durably
from train.config import Config, ConfigError
from train.data import prepared, split, units
from train.data.pool import Said, spread
from train.data.prepared import NAME, PLAN, SIDES, UNFINISHED, About
from train.data.survey import Files, Survey, Unit, joined, limit_of
from train.data.tokenizer import FILE, SETTINGS, FileTokenizer, Tokenizer
from train.data.units import Work, survey_unit, tokenize_unit

LOCK = "lock"
LIMIT = "limit"
"""The limit of the split under which the existing parts were made."""


@dataclass(frozen=True)
class Text:
    """What is to be read."""

    units: tuple[Unit, ...]
    about: str
    """What is read, in words."""
    identity: tuple[str, ...]
    """Names, sizes and times of the files, as far as they are known."""

    @property
    def is_surveyed(self) -> bool:
        """Whether it is read once before it is tokenized, which a remote stream is not."""
        return all(isinstance(unit, Files) for unit in self.units)


def prepare(
    folder: Path, text: Text, tokenizer: Tokenizer, config: Config, workers: int, said: Said
) -> About:
    """Make the folder, or what is missing of it.

    Raises Unreadable for broken text, ConfigError for a folder of something else, and OSError where
    the disk refuses; what was made stays.
    """
    plan = plan_of(text, tokenizer, config)
    if (folder / NAME).is_file():
        _compare(folder, prepared.read(folder).made_of, plan)
        # Of one that was killed at its end.
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    else:
        with _begun(folder, plan):
            if not (folder / NAME).is_file():  # another process may have been quicker
                _make(folder, text, tokenizer, config, workers, said, plan)
    return prepared.read(folder)


def _make(
    folder: Path,
    text: Text,
    tokenizer: Tokenizer,
    config: Config,
    workers: int,
    said: Said,
    plan: dict[str, Any],
) -> None:
    work = Work(folder, text.units, tokenizer, part=units.PART)
    if text.is_surveyed:
        missing = [n for n in work.numbers if not work.survey_of(n).exists()]
        spread(survey_unit, work, missing, workers, said, "reading the text")
    while True:
        surveys = _surveys(work)
        # Of text that is not read yet: as if some of it were held out, which is rarely wrong.
        fraction = config.data.valid_fraction
        limit = split.limit(fraction) if surveys is None else limit_of(fraction, surveys)
        _begin_with(limit, work)
        missing = [n for n in work.numbers if not work.is_done(n)]
        work = replace(work, limit=limit)
        if not missing:
            break
        total = surveys.characters if surveys else None
        spread(tokenize_unit, work, missing, workers, said, "tokenizing", total)
    assert surveys is not None  # a unit that is done has one
    _write_tokenizer(folder, tokenizer)
    prepared.write(folder, _about(work, surveys, plan, text, tokenizer, config))


def plan_of(text: Text, tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    """Plain values: what decides the bytes of the folder."""
    data = config.data
    files = hashlib.blake2b("\n".join(text.identity).encode("utf-8", "replace"), digest_size=16)
    return {
        "version": prepared.VERSION,
        "data.text_column": data.text_column,
        "data.valid_fraction": data.valid_fraction,
        "tokenizer": tokenizer.digest,
        "the files of the text": files.hexdigest(),
    }


def _compare(folder: Path, there: dict[str, Any], plan: dict[str, Any]) -> None:
    changed = [key for key in plan if there.get(key) != plan[key]]
    if changed:
        raise ConfigError(
            f"{folder} was made of something else: {' and '.join(changed)} differ; name another "
            "folder, or remove that one"
        )


def _read_plan(inner: Path) -> dict[str, Any] | None:
    try:
        there = json.loads((inner / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return there if isinstance(there, dict) else None


@contextmanager
def _begun(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """One process at a time works on a folder, which is of this plan or new; when it is done, only
    the result is left."""
    inner = folder / UNFINISHED
    if not (inner / PLAN).is_file() and folder.is_dir() and {*folder.iterdir()} - {inner}:
        raise ConfigError(
            f"{folder} is not empty, and not what prepare_data began; name a new folder"
        )
    inner.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(inner / LOCK, timeout=0):
            there = _read_plan(inner)
            if there is None and any(_parts(folder)):
                raise prepared.damaged(folder, f"{PLAN} is not what prepare_data writes")
            if there is not None and any(_parts(folder)):
                _compare(folder, there, plan)
            elif there != plan:  # nothing is lost: begin as if nothing were there
                for old in {*inner.iterdir()} - {inner / LOCK}:
                    old.unlink()
                new = inner / f"{PLAN}.unfinished"
                new.write_text(json.dumps(plan, indent=1), encoding="utf-8")
                new.replace(inner / PLAN)
            _remove_unfinished(folder)
            try:
                yield
            finally:  # where the disk is full, their space is needed
                _remove_unfinished(folder)
            shutil.rmtree(inner)
    except filelock.Timeout:
        raise ConfigError(
            f"another prepare_data is running in {folder}; wait for it, or name another folder"
        ) from None


def _remove_unfinished(folder: Path) -> None:
    """Files that a process was about to write when it ended."""
    for left in (*folder.glob("*.unfinished"), *(folder / UNFINISHED).glob("*.unfinished")):
        left.unlink()


def _begin_with(limit: int, work: Work) -> None:
    """Remove parts that were made under another limit of the split."""
    known = work.inner / LIMIT
    if known.is_file() and known.read_bytes() == str(limit).encode():
        return
    for old in (*work.inner.glob("done-*"), *_parts(work.folder)):
        old.unlink()
    known.write_text(str(limit))


def _parts(folder: Path) -> Iterator[Path]:
    for side in SIDES:
        yield from folder.glob(f"{side}-*.arrow")


def _surveys(work: Work) -> Survey | None:
    """The survey of all units, if all are known."""
    if not all(work.survey_of(number).exists() for number in work.numbers):
        return None
    return joined([work.read_survey(number) for number in work.numbers])


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    if isinstance(tokenizer, FileTokenizer):
        text, eod = tokenizer.__reduce__()[1]
        write_durably(folder / FILE, text)
        write_durably(folder / SETTINGS[0], json.dumps({"eos_token": eod}) + "\n")


def _about(
    work: Work,
    surveys: Survey,
    plan: dict[str, Any],
    text: Text,
    tokenizer: Tokenizer,
    config: Config,
) -> About:
    files: dict[str, tuple[int, int]] = {}
    for number in work.numbers:
        files |= work.files_of(number) or {}
    return About(
        version=prepared.VERSION,
        source=text.about.encode("utf-8", "replace").decode(),
        text_column=config.data.text_column,
        split=config.data.split,
        valid_fraction=config.data.valid_fraction,
        tokenizer=config.data.tokenizer,
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        documents=len(surveys.digests),
        valid_documents=int(surveys.is_valid(work.limit).sum()),
        replaced=surveys.replaced,
        copies=surveys.copies(),
        characters=surveys.characters,
        text=surveys.text(),
        files=dict(sorted(files.items())),
        made_of=plan,
    )
