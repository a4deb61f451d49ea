"""Streams of tokens in files of Arrow, and the sequences that are cut from them.

    with TokenFile(path, "uint16") as file:
        file.add(ids)
    sequences = Sequences(streams=[path], length=513)
    sequences[[4, 2]]["tokens"]                     # [2, 513]

A stream is documents, each followed by the end-of-document token. It has no sequences in it: they
are cut when they are read, of whatever length.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from train.data.tokenizer import Tokenizer
from train.whole_file import unfinished

TOGETHER = 1 << 20
"""Tokens that are written at once."""


def token_type(tokenizer: Tokenizer) -> str:
    """The smallest type of NumPy that holds every token, of the two that are used."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "int32"


class TokenFile:
    """A file of tokens, written from start to finish; until then it has another name.

    Raises OSError where the disk refuses.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        # Of this process only: a killed one may not have ended yet.
        self.unfinished = unfinished(path)
        self.waiting: list[np.ndarray] = []
        self.size = 0
        self.schema = pa.schema([("tokens", pa.from_numpy_dtype(np.dtype(dtype)))])

    def __enter__(self) -> "TokenFile":
        self.file = self.unfinished.open("wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)
        return self

    def __exit__(self, *error: Any) -> None:
        with self.file:
            if error[0] is None:
                self._flush()
                self.stream.close()
                self.file.flush()
                os.fsync(self.file.fileno())
        if error[0] is None:
            self.unfinished.replace(self.path)
        else:
            self.unfinished.unlink(missing_ok=True)

    def add(self, ids: np.ndarray) -> None:
        """Tokens, integers [any number] that `dtype` can hold."""
        self.waiting.append(ids.astype(self.dtype))
        self.size += len(ids)
        if self.size >= TOGETHER:
            self._flush()

    def _flush(self) -> None:
        if self.size:
            flat = pa.array(np.concatenate(self.waiting))
            self.stream.write_batch(pa.record_batch([flat], schema=self.schema))
        self.waiting, self.size = [], 0


def read_tokens(path: Path) -> list[np.ndarray]:
    """A file's tokens in order, memory-mapped: arrays that share nothing but the file.

    Raises OSError, ArrowException.
    """
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        (column,) = stream.read_all().itercolumns()
        return [chunk.to_numpy(zero_copy_only=True) for chunk in column.chunks]


class Sequences:
    """Sequences of `length` tokens from files that follow each other as one stream, or from arrays.

    What is left over at the end, less than a sequence, is dropped. Pickles as the names of files.
    """

    def __init__(
        self, length: int, files: Sequence[Path] = (), arrays: Sequence[np.ndarray] = ()
    ) -> None:
        self.length, self.files = length, tuple(files)
        self._arrays = [*arrays]
        self._open()
        self.first, self.count = 0, self.tokens // length

    @property
    def tokens(self) -> int:
        """Tokens in the whole stream."""
        return int(self._starts[-1])

    def part(self, first: int, count: int) -> "Sequences":
        """This many of them, from the one with number `first` on."""
        part = Sequences(self.length, self.files, [] if self.files else self._arrays)
        part.first, part.count = self.first + first, count
        return part

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, numbers: Sequence[int] | slice) -> dict[str, np.ndarray]:
        """`tokens`, integers [numbers, length]."""
        if isinstance(numbers, slice):
            numbers = range(self.count)[numbers]
        if not numbers:
            return {"tokens": np.empty((0, self.length), np.int32)}
        return {"tokens": np.stack([self._one(number) for number in numbers])}

    def _one(self, number: int) -> np.ndarray:
        if not 0 <= number < self.count:
            raise IndexError(number)
        begin = (self.first + number) * self.length
        end = begin + self.length
        at = int(np.searchsorted(self._starts, begin, side="right")) - 1
        pieces = []
        while begin < end:  # rarely more than one
            start = int(self._starts[at])
            piece = self._arrays[at][begin - start : end - start]
            pieces.append(piece)
            begin += len(piece)
            at += 1
        return np.concatenate(pieces)

    def _open(self) -> None:
        if self.files:
            self._arrays = [array for file in self.files for array in read_tokens(file)]
        self._starts = np.cumsum([0, *map(len, self._arrays)])

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_starts": None}
        return state | {"_arrays": []} if self.files else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class Joined:
    """Sequences of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Sequences]) -> None:
        self.sources = tuple(sources)
        self.firsts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, numbers: Sequence[int] | slice) -> dict[str, np.ndarray]:
        """`tokens`, integers [numbers, length]."""
        rows = []
        for number in range(len(self))[numbers] if isinstance(numbers, slice) else numbers:
            source = int(np.searchsorted(self.firsts, number, side="right")) - 1
            place = number - int(self.firsts[source])
            rows.append(self.sources[source][[place]]["tokens"][0])
        return {"tokens": np.stack(rows)}
