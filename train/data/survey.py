"""A first pass over local documents: whether all can be read, how many, and which are held out.

It costs little compared with tokenizing, and finds a broken record before that starts.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np

from train.data import split
from train.data.faults import Unreadable
from train.data.files import too_strange
from train.data.readers import Document, read_documents


class Unit(Protocol):
    """A part of the text that one process reads from start to finish."""

    def documents(self) -> Iterator[Document]:
        """Those that are not empty, the same ones each time. Raises Unreadable."""
        ...


@dataclass(frozen=True)
class Files:
    """Files of one kind as a unit: local ones, or URLs that fsspec knows."""

    kind: str
    files: tuple[str, ...]
    column: str

    def documents(self) -> Iterator[Document]:
        for path in self.files:
            for document in read_documents(self.kind, path, self.column):
                pieces = iter(document)
                first = next(pieces, "")
                if first:
                    yield chain((first,), pieces)


@dataclass(frozen=True)
class Survey:
    """What the documents are, all that are not empty, in the order of their files."""

    digests: np.ndarray
    """A hash of each one's text; its bytes are two big-endian uint64 [documents, 2]."""
    characters: int
    replaced: int
    """Documents with U+FFFD, which stands for what is not UTF-8."""

    def is_valid(self, limit: int) -> np.ndarray:
        """Whether each is held out under a limit of `split.limit`; bool [documents]."""
        places = self.digests[:, 0].astype(np.uint64)
        # 2^64 does not fit into an array of uint64.
        return places <= np.uint64(limit - 1) if limit else np.zeros(len(places), bool)

    def text(self) -> str:
        """A hash of all texts in their order."""
        return hashlib.blake2b(self.digests.tobytes(), digest_size=16).hexdigest()

    def copies(self) -> int:
        """Documents whose text an earlier one has."""
        return len(self.digests) - len(np.unique(self.digests[:, 0]))


def survey(unit: Files, report: Callable[[int], None] = lambda characters: None) -> Survey:
    """Read everything once, and tell `report` how much was read since it was told last.

    Raises Unreadable for the first file or record that is broken.
    """
    counting = Counting()
    for path in unit.files:
        of_file = Characters()
        for document in Files(unit.kind, (path,), unit.column).documents():
            of_document = counting.count(document)[1]
            of_file.add(of_document)
            report(of_document.all)
        # A NUL in a record was escaped, so it is intended.
        nuls = of_file.nuls if unit.kind == "text" else 0
        reason = too_strange(of_file.all, of_file.replaced, nuls)
        if reason:
            raise Unreadable(f"{path} is not text: {reason}")
    return counting.survey()


def joined(surveys: list[Survey]) -> Survey:
    """One after the other."""
    digests = np.concatenate(
        [np.empty((0, 2), ">u8"), *(one.digests for one in surveys)], dtype=">u8"
    )
    characters = sum(one.characters for one in surveys)
    return Survey(digests, characters, sum(one.replaced for one in surveys))


def limit_of(fraction: float, documents: Survey) -> int:
    """The limit below which documents are held out, as many as `fraction` says.

    A single document, such as one long text file, is all training: its last sequences are held out
    when it is cut into sequences.
    """
    places = documents.digests[:, 0]
    return split.limit(fraction, [int(places.min())]) if len(places) > 1 else 0


class Counting:
    """Makes a survey of a stream of documents."""

    def __init__(self) -> None:
        self.digests = bytearray()
        self.characters = self.replaced = 0

    def count(self, document: Document) -> tuple[bytes, "Characters"]:
        """Read one; its digest and its characters."""
        found = Characters()
        digest = split.digest(found.counted(document))
        self.digests += digest
        self.characters += found.all
        self.replaced += found.replaced > 0
        return digest, found

    def survey(self) -> Survey:
        digests = np.frombuffer(bytes(self.digests), ">u8").reshape(-1, 2)
        return Survey(digests, self.characters, self.replaced)


class Characters:
    """How many characters a text has, and how many that texts do not."""

    def __init__(self) -> None:
        self.all = self.replaced = self.nuls = 0

    def counted(self, pieces: Document) -> Iterator[str]:
        for piece in pieces:
            self.all += len(piece)
            self.replaced += piece.count("\ufffd")
            self.nuls += piece.count("\0")
            yield piece

    def add(self, other: "Characters") -> None:
        self.all += other.all
        self.replaced += other.replaced
        self.nuls += other.nuls
