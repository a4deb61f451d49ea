"""What one process makes of a unit of text: its survey, and its tokens in parts.

Existing parts are skipped, so an interrupted unit is read again, but tokenized only from its last
whole part on. Nothing in the files depends on which process wrote them, or in how many starts.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa

from train.config import ConfigError
from train.data import prepared, split
from train.data.faults import Unreadable
from train.data.prepared import SIDES, UNFINISHED
from train.data.readers import Document
from train.data.survey import Counting, Files, Survey, Unit, survey
from train.data.tokenizer import TOGETHER, Tokenizer
from train.data.tokens import TokenFile, read_tokens, token_type
from train.whole_file import whole

PART = 1 << 27
"""Characters of a part, about. Those since its start are tokenized again after a kill. A change of
this, TOGETHER or UNIT must increase `prepared.VERSION`: unfinished folders have other parts."""

Report = Callable[[int], None]
"""Called with the characters read since its last call."""

Parts = dict[str, tuple[int, int]]
"""Bytes and tokens of files with tokens."""

CHANGED = "files changed while they were read; start again"


@dataclass(frozen=True)
class Work:
    """What all processes share. Pickled and sent to each once."""

    folder: Path
    units: tuple[Unit, ...]
    tokenizer: Tokenizer
    limit: int = 0
    """The limit of the split."""
    part: int = PART

    @property
    def inner(self) -> Path:
        return self.folder / UNFINISHED

    @property
    def numbers(self) -> range:
        return range(len(self.units))

    def survey_of(self, number: int) -> Path:
        """The file of a unit's survey."""
        return self.inner / f"survey-{number:05}.npz"

    def mark_of(self, number: int) -> Path:
        """The file that says that a unit's parts are all there."""
        return self.inner / f"done-{number:05}"

    def is_done(self, number: int) -> bool:
        """Whether the survey and all parts of a unit are there and intact; damaged ones are
        removed."""
        mark = self.mark_of(number)
        files = self.files_of(number)
        if files is None or not self.survey_of(number).exists():
            return False
        for name, (size, _) in files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                path.unlink(missing_ok=True)
                mark.unlink(missing_ok=True)
        return mark.is_file()

    def files_of(self, number: int) -> Parts | None:
        """Bytes and tokens of each file of a unit that is done."""
        try:
            found = json.loads(self.mark_of(number).read_text())
            return {name: (size, tokens) for name, (size, tokens) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write_mark(self, number: int) -> None:
        """Mark a unit as done. Raises ConfigError for a damaged part."""
        files: Parts = {}
        for side in SIDES:
            for path in sorted(self.folder.glob(f"{side}-{number:05}-*.arrow")):
                try:
                    files[path.name] = (path.stat().st_size, sum(map(len, read_tokens(path))))
                except (OSError, ValueError, pa.ArrowException) as error:
                    reason = " ".join(str(error).split())
                    raise ConfigError(
                        f"{path} is damaged ({reason}); remove it, and the same command makes it "
                        "again"
                    ) from None
        with whole(self.mark_of(number)) as new, new.open("w") as file:
            json.dump(files, file)
            file.flush()
            os.fsync(file.fileno())

    def part_of(self, side: str, number: int, part: int) -> Path:
        return self.folder / f"{side}-{number:05}-{part:03}.arrow"

    def read_survey(self, number: int) -> Survey:
        """Raises ConfigError where it is damaged."""
        path = self.survey_of(number)
        try:
            with np.load(path) as file:
                return Survey(file["digests"], int(file["characters"]), int(file["replaced"]))
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = f"{path.name} is not a survey ({type(error).__name__})"
            raise prepared.damaged(self.folder, reason) from None

    def write_survey(self, number: int, found: Survey) -> None:
        with whole(self.survey_of(number)) as new, new.open("wb") as file:
            np.savez(file, **vars(found))
            file.flush()
            os.fsync(file.fileno())


def survey_unit(work: Work, number: int, report: Report) -> None:
    """Read a unit and write its survey. Raises Unreadable, OSError."""
    unit = work.units[number]
    assert isinstance(unit, Files)
    work.write_survey(number, survey(unit, report))


def tokenize_unit(work: Work, number: int, report: Report) -> None:
    """Write what is missing of a unit's parts; of a stream its survey too.

    Raises Unreadable, OSError, and ConfigError for text that the tokenizer has no tokens for.
    """
    known = work.read_survey(number) if work.survey_of(number).exists() else None
    counting = Counting()
    batches = _batches(_sided(work, number, known, counting), known, work.part)
    for part, of_part in groupby(batches, key=itemgetter(0)):
        paths = [work.part_of(side, number, part) for side in SIDES]
        is_there = all(path.exists() for path in paths)
        with ExitStack() as stack:
            dtype = token_type(work.tokenizer)
            files = [stack.enter_context(TokenFile(path, dtype)) for path in paths if not is_there]
            for _, batch in of_part:
                if files:
                    _add(batch, files, work.tokenizer)
                report(sum(len(piece) for _, piece in batch))
    if known is None:
        work.write_survey(number, counting.survey())
    work.write_mark(number)


def _sided(
    work: Work, number: int, known: Survey | None, counting: Counting
) -> Iterator[tuple[int, Document]]:
    """Each document with its side, a place in SIDES; counted where it was not before."""
    documents = work.units[number].documents()
    if known is None:
        for document in documents:
            pieces = [*document]
            digest, _ = counting.count(pieces)
            yield int(split.place(digest) < work.limit), pieces
        return
    sides = known.is_valid(work.limit).astype(int).tolist()
    seen = 0
    for seen, document in enumerate(documents, 1):
        if seen > len(sides):
            break
        yield sides[seen - 1], document
    if seen != len(sides):
        raise Unreadable(CHANGED)


def _batches(
    documents: Iterator[tuple[int, Document]], known: Survey | None, part: int
) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Pieces with the side of their document, each one ended by an empty piece; about TOGETHER
    characters at a time, each time with the number of the part."""
    batch: list[tuple[int, str]] = []
    size = done = 0
    for side, document in documents:
        for piece in chain(document, [""]):
            batch.append((side, piece))
            size += len(piece)
            if size >= TOGETHER:
                yield done // part, batch
                done += size
                batch, size = [], 0
    if known is not None and known.characters != done + size:
        raise Unreadable(CHANGED)
    if batch:
        yield done // part, batch


def _add(batch: list[tuple[int, str]], files: list[TokenFile], tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode([piece for _, piece in batch])
    for (side, piece), ids in zip(batch, encoded, strict=True):
        files[side].add(ids if piece else np.array([tokenizer.eod]))
