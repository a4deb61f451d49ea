"""The documents of one file: of text, JSON, Parquet or Arrow.

    for document in read_documents("json", "corpus.jsonl.gz", column="text"):
        text = "".join(document)

A text file is one document, read in pieces: it may be larger than memory. Only one column of a
record is read; records without text are left out. Bytes that are not UTF-8 and lone surrogates
become U+FFFD, since no tokenizer takes them.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.data.faults import Unreadable
from train.data.opening import READ_ERRORS, open_file
from train.data.pieces import PIECE, last_cut

Document = Iterable[str]
"""Pieces of one text, in order. Each document is read before the next one is asked for."""

ROWS = 1000
"""Records of Parquet that are read at a time."""

UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""How a UTF-16 file begins."""

_SURROGATES = re.compile("[\ud800-\udfff]")


def read_documents(kind: str, path: str, column: str) -> Iterator[Document]:
    """The documents of a file of a kind: text, json, parquet or arrow. Raises Unreadable."""
    with _named(path):
        yield from READERS[kind](path, column)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """An error inside names the file, and the record where that is known."""
    try:
        yield
    except Unreadable:
        raise
    except READ_ERRORS as error:
        raise Unreadable(
            f"{path}: {_reason(error)}; fix, replace or leave out that file"
        ) from error


def _read_text(path: str, column: str) -> Iterator[Document]:
    yield _pieces(path)


def _pieces(path: str) -> Iterator[str]:
    with (
        _named(path),
        io.TextIOWrapper(open_file(path), "utf-8-sig", errors="replace") as file,
    ):
        waiting = ""
        while read := file.read(PIECE):
            waiting += read
            end = last_cut(waiting, 0, len(waiting))
            yield waiting[:end]
            waiting = waiting[end:]
        if waiting:
            yield waiting


def _read_json(path: str, column: str) -> Iterator[Document]:
    records = _Records(path, column)
    for place, record in _json_values(path):
        text = records.text(record, place)
        if text:
            yield (text,)
    records.check_column()


def _json_values(path: str) -> Iterator[tuple[str, Any]]:
    """Each value with its place: one a line; or, where the first line is not a whole object, those
    of the file as a whole: an array, or objects that are spread over lines."""
    with open_file(path) as file:
        first = True
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith(UTF16):
                raise Unreadable(f"{path} is UTF-16; {CONVERT}")
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "replace").strip()
            if not line:
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                if first:
                    yield from _whole(path, line, file.read(), number)
                    return
                raise Unreadable(f"{path}, line {number}: {error.msg}; {MEND}") from None
            except (ValueError, RecursionError) as error:
                raise Unreadable(f"{path}, line {number}: {error}; {MEND}") from None
            if first and isinstance(value, list):
                yield from _numbered(value)
            else:
                yield f"line {number}", value
            first = False


def _whole(path: str, line: str, rest: bytes, number: int) -> Iterator[tuple[str, Any]]:
    text = f"{line}\n{rest.decode('utf-8', 'replace')}"
    decoder, place, count = json.JSONDecoder(), 0, 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            where = f"line {number - 1 + error.lineno}"
            raise Unreadable(f"{path}, {where}: {error.msg}; {MEND}") from None
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"{path}: {error}; {MEND}") from None
        if isinstance(value, list):
            yield from _numbered(value)
        else:
            count += 1
            yield f"record {count}", value
        while place < len(text) and text[place] in " \t\r\n":
            place += 1


def _numbered(values: list[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"record {n}", value) for n, value in enumerate(values, 1))


class _Records:
    """The text in a file's JSON objects, and whether any of them has the column."""

    def __init__(self, path: str, column: str) -> None:
        self.path, self.column = path, column
        self.columns: set[str] = set()

    def text(self, record: Any, place: str) -> str | None:
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise Unreadable(
                f"{self.path}, {place} is {kind}, not an object with data.text_column={self.column}"
            )
        if self.column not in self.columns:
            self.columns |= record.keys()
        value = record.get(self.column)
        if value is None:
            return None
        if not isinstance(value, str):
            raise _not_text(self.column, type(value).__name__, f"{self.path}, {place}")
        return _SURROGATES.sub("\ufffd", value) if _has_surrogates(value) else value

    def check_column(self) -> None:
        if self.columns and self.column not in self.columns:
            raise _no_column(self.column, self.path, sorted(self.columns))


def _has_surrogates(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_parquet(path: str, column: str) -> Iterator[Document]:
    with open_file(path) as file, pq.ParquetFile(file) as parquet:
        if parquet.metadata.num_rows == 0:
            return
        _check_type(parquet.schema_arrow, column, path)
        row = 0
        try:
            for batch in parquet.iter_batches(ROWS, columns=[column]):
                yield from _texts(batch.column(0))
                row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise Unreadable(f"{path}, after row {row}: {_reason(error)}; {MEND}") from error


def _read_arrow(path: str, column: str) -> Iterator[Document]:
    with pa.memory_map(path) as file:
        try:
            reader: Any = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(file)  # the other form, that of Feather
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
        else:
            batches = reader
        for batch in batches:
            if len(batch):
                _check_type(batch.schema, column, path)
                yield from _texts(batch.column(column))


def _check_type(schema: pa.Schema, column: str, path: str) -> None:
    if column not in schema.names:
        raise _no_column(column, path, schema.names)
    if schema.names.count(column) > 1:
        raise Unreadable(f"{path} has more than one column {column}; give one another name")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_null,
    )
    if not any(test(kind) for test in tests):
        raise _not_text(column, str(kind), path)


def _texts(column: pa.Array) -> Iterator[Document]:
    if pa.types.is_null(column.type):
        return
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # As bytes: they are not known to be UTF-8.
    for value in column.cast(pa.large_binary()):
        text = value.as_py()
        if text:
            yield (text.decode("utf-8", "replace"),)


def _no_column(column: str, path: str, columns: Iterable[str]) -> Unreadable:
    return Unreadable(
        f"data.text_column={column} is not in {path}; its columns are {', '.join(columns)}"
    )


def _not_text(column: str, kind: str, where: str) -> Unreadable:
    return Unreadable(
        f"data.text_column={column} holds {kind} in {where}, not text; name a column of strings"
    )


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


READERS: dict[str, Callable[[str, str], Iterator[Document]]] = {
    "text": _read_text,
    "json": _read_json,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}

CONVERT = "convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"
MEND = "fix or leave out that record"
