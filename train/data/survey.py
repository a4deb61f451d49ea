"""A first pass over local documents: whether all can be read, how many, and which are held out.

It costs little beside tokenizing, and finds the broken record before that has begun.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from train.data import split
from train.data.faults import Unreadable
from train.data.files import LocalFiles, too_strange
from train.data.readers import Document, read_documents


@dataclass(frozen=True)
class Survey:
    """What the documents are, all that are not empty, in the order of their files."""

    is_valid: np.ndarray
    """Whether each is held out; bool [documents]."""
    characters: int
    replaced: int
    """Documents with U+FFFD, which stands for what is no UTF-8."""
    digest: str
    """Of all texts in their order."""


def survey(found: LocalFiles, column: str, valid_fraction: float) -> Survey:
    """Read everything once. Raises Unreadable for the first file or record that is broken."""
    places = array("Q")
    everything = hashlib.blake2b(digest_size=16)
    characters = replaced = 0
    for path in found.files:
        of_file = _Characters()
        for document in read_documents(found.kind, path, column):
            of_document = _Characters()
            digest = split.digest(of_document.counted(document))
            if of_document.all == 0:
                continue
            places.append(split.place(digest))
            everything.update(digest)
            replaced += of_document.replaced > 0
            of_file.add(of_document)
        # A NUL in a record was escaped, and so is meant.
        nuls = of_file.nuls if found.kind == "text" else 0
        reason = too_strange(of_file.all, of_file.replaced, nuls)
        if reason:
            raise Unreadable(f"{path} is not text: {reason}")
        characters += of_file.all
    # A single document, such as one long text file, is all training: whoever packs it holds its
    # last sequences out.
    limit = split.limit(valid_fraction, places) if len(places) > 1 else 0
    # Compared as Python's whole numbers: a limit of 2^64 is one too many for an array.
    is_valid = np.fromiter((place < limit for place in places), dtype=bool, count=len(places))
    return Survey(is_valid, characters, replaced, everything.hexdigest())


def documents_of(found: LocalFiles, column: str) -> Iterator[Document]:
    """The documents that a survey counts, in its order."""
    for path in found.files:
        for document in read_documents(found.kind, path, column):
            pieces = iter(document)
            first = next(pieces, "")
            if first:
                yield chain((first,), pieces)


class _Characters:
    """How many characters a text has, and how many that texts do not."""

    def __init__(self) -> None:
        self.all = self.replaced = self.nuls = 0

    def counted(self, pieces: Document) -> Iterator[str]:
        for piece in pieces:
            self.all += len(piece)
            self.replaced += piece.count("\ufffd")
            self.nuls += piece.count("\0")
            yield piece

    def add(self, other: "_Characters") -> None:
        self.all += other.all
        self.replaced += other.replaced
        self.nuls += other.nuls
