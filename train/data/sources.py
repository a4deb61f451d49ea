"""Where documents come from: the standard library, local files or the hub; what is held out.

A hub data set is a stream, of which `split_stream` takes the first documents for validation; to be
prepared, each of its files is a `Shard`, and a part of a local text `Files`.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from train.config import Config, ConfigError
from train.data import prepared, split
from train.data.cache import about_the_cache
from train.data.faults import UNREADABLE, Unreadable, last_line
from train.data.files import LocalFiles, find_files, kind_of
from train.data.prepare import Text
from train.data.readers import Document, read_documents
from train.data.survey import Files, limit_of, survey
from train.data.tokenizer import Tokenizer

OWN_READERS = {"json": Json, "parquet": Parquet}
"""Kinds of hub data sets whose files are read like local ones; `datasets` reads the others."""

UNIT = 1 << 26
"""Bytes of small files that one process reads in one go."""


def quiet() -> None:
    """Silence `datasets`: every rank would print its messages."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported as ConfigError
    # And every retry of the hub's client, once for each rank.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def sources_of(config: Config) -> list[Config]:
    """A config for each source of a mixture, with its path alone; without a mixture the config
    itself."""
    data = config.data
    return [
        config.model_copy(update={"data": data.model_copy(update={"path": path, "mixture": {}})})
        for path in data.mixture
    ] or [config]


def local_files(config: Config) -> LocalFiles:
    """The files of text that `data.path` means. Raises ConfigError."""
    path = config.data.path
    if prepared.is_prepared(path):
        raise ConfigError(f"data.path={path} holds tokens; name the text that they were made of")
    return find_files(path, config.data.split)


def local_text(config: Config, found: LocalFiles) -> Text:
    """Local files as units of UNIT bytes or of one file that is larger. Raises Unreadable."""
    units: list[Files] = []
    files: list[str] = []
    identity, size = [found.kind], 0
    for file in found.files:
        try:
            about = Path(file).stat()
        except OSError as error:
            raise Unreadable(f"{file}: {error.strerror}") from None
        if files and size + about.st_size > UNIT:
            units.append(Files(found.kind, tuple(files), config.data.text_column))
            files, size = [], 0
        files.append(file)
        size += about.st_size
        name = Path(file).absolute()
        identity.append(f"{len(units)} {name} {about.st_size} {about.st_mtime_ns}")
    units.append(Files(found.kind, tuple(files), config.data.text_column))
    source = config.data.path or "the standard library of Python"
    about_it = f"{source}: {len(found.files):,} {found.kind} file(s)"
    return Text(tuple(units), about_it, tuple(identity))


def hub_text(config: Config) -> Text:
    """A hub data set, a unit a file. Raises ConfigError."""
    quiet()
    data, stream = config.data, _open_hub(config)
    count = stream.num_shards
    units = tuple(Shard(config, stream, number, count) for number in range(count))
    sizes = stream.info.download_checksums or {}
    identity = (
        *(str(data.name), str(data.subset), data.split, str(count)),
        *(f"{name} {about['num_bytes']}" for name, about in sizes.items()),
    )
    about = f"{data.name}: subset {data.subset}, split {data.split}, {count:,} file(s)"
    return Text(units, about, identity)


@dataclass(frozen=True)
class Shard:
    """One of the files of a stream as a unit."""

    config: Config
    stream: datasets.IterableDataset
    number: int
    count: int

    def documents(self) -> Iterator[Document]:
        try:
            for row in self.stream.shard(num_shards=self.count, index=self.number):
                text = _text_of(self.config, row)
                if text:
                    yield (text,)
        except UNREADABLE as error:
            raise Unreadable(last_line(error)) from None


def load_stream(config: Config) -> tuple[datasets.IterableDataset, datasets.Dataset]:
    """Training documents of the hub data set, not read yet, and validation documents: one string
    column each. Raises ConfigError."""
    quiet()
    return split_stream(config, _open_hub(config))


def training_texts(config: Config) -> Iterator[str]:
    """The training documents without the validation documents, long ones in pieces.

    Raises ConfigError.
    """
    if config.data.mixture:
        yield from _one_of_each([training_texts(one) for one in sources_of(config)])
        return
    if config.data.name is not None:
        train, _ = load_stream(config)
        try:
            yield from (text for row in train for text in row.values() if text)
        except UNREADABLE as error:
            raise ConfigError(f"{source_of(config)} cannot be read: {last_line(error)}") from None
        return
    found = local_files(config)
    with readable(config, found.kind):
        unit = Files(found.kind, found.files, config.data.text_column)
        about = survey(unit)
        is_valid = about.is_valid(limit_of(config.data.valid_fraction, about))
        check_documents(config, len(is_valid), int(is_valid.sum()))
        for document, held_out in zip(unit.documents(), is_valid, strict=True):
            if not held_out:
                yield from document


def _one_of_each(texts: list[Iterator[str]]) -> Iterator[str]:
    """Interleaved, so that the first texts of a mixture are from every source."""
    while texts:
        for one in [*texts]:
            try:
                yield next(one)
            except StopIteration:
                texts.remove(one)


@contextmanager
def readable(config: Config, kind: str) -> Iterator[None]:
    """An error of reading inside is a ConfigError that names the data, the file and the record."""
    try:
        yield
    except Unreadable as error:
        raise ConfigError(f"{source_of(config)} cannot be read as {kind}: {error}") from None


def split_stream(
    config: Config, documents: datasets.IterableDataset
) -> tuple[datasets.IterableDataset, datasets.Dataset]:
    """The training documents of a stream, unread, and the first of its validation documents.

    It is read until `data.valid_documents` of those were found. Raises ConfigError.
    """
    data = config.data
    held_out: list[str] = []
    lowest: tuple[int, str] | None = None
    limit, count = split.limit(data.valid_fraction), 0
    try:
        for row in documents:
            text = _text_of(config, row)
            if not text:
                continue
            count += 1
            place = split.place(split.digest([text]))
            lowest = min(lowest or (place, text), (place, text))
            if place < limit:
                held_out.append(text)
            if len(held_out) == data.valid_documents:
                break
    except UNREADABLE as error:
        raise ConfigError(f"{source_of(config)} cannot be read: {last_line(error)}") from None
    if lowest is not None and not held_out:  # a few, by chance all of them above the limit
        limit, held_out = split.limit(data.valid_fraction, [lowest[0]]), [lowest[1]]
    if len(held_out) < data.valid_documents:  # the stream has ended
        check_documents(config, count, len(held_out))
    column = data.text_column
    train = documents.select_columns(column).filter(
        _is_training, input_columns=column, fn_kwargs={"limit": limit}
    )
    return train, datasets.Dataset.from_dict({column: held_out})


def _text_of(config: Config, row: dict[str, Any]) -> str | None:
    column = config.data.text_column
    if column not in row:
        raise ConfigError(
            f"data.text_column={column} is not in {source_of(config)}; its columns are "
            f"{', '.join(row)}"
        )
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise ConfigError(
            f"data.text_column={column} of {source_of(config)} holds {type(text).__name__}, not "
            "text; name a column of strings"
        )
    return text


def _is_training(text: str | None, limit: int) -> bool:
    return text is not None and text != "" and split.place(split.digest([text])) >= limit


def _open_hub(config: Config) -> datasets.IterableDataset:
    data = config.data
    try:
        builder = datasets.load_dataset_builder(data.name, data.subset)
        files = [str(file) for file in (builder.config.data_files or {}).get(data.split, [])]
        kind = next((k for k, of in OWN_READERS.items() if isinstance(builder, of)), "")
        # `datasets` wants the same columns in all files; here only one matters.
        if {kind_of(file) for file in files} == {kind} and not _has_field(builder):
            stream = datasets.IterableDataset.from_generator(
                _records, gen_kwargs={"files": files, "kind": kind, "column": data.text_column}
            )
            stream.info.download_checksums = _sizes(files)
            return stream
        return builder.as_streaming_dataset(split=data.split)
    except (*UNREADABLE, NotImplementedError) as error:
        raise ConfigError(
            f"{source_of(config)} data.subset={data.subset} data.split={data.split} cannot be "
            f"opened on the hub: {_cause(error)}{about_the_cache(error)}"
        ) from None


def _has_field(builder: datasets.DatasetBuilder) -> bool:
    """Whether the data set's card says that its records lie inside a field of its JSON."""
    return isinstance(builder, Json) and builder.config.field is not None


def _records(files: list[str], kind: str, column: str) -> Iterator[dict[str, str]]:
    for file in files:
        for document in read_documents(kind, file, column):
            yield {column: "".join(document)}


def _sizes(files: list[str]) -> dict[str, Any]:
    """The size of each file in bytes, where it is told; by its name without the hub's revision."""
    sizes: dict[str, Any] = {}
    for file in files:
        try:
            system, path = fsspec.core.url_to_fs(file)
            size = system.size(path)
        except Exception:  # any error of the file system: sizes are only for the fingerprint
            size = None
        sizes[re.sub(r"@[^/]*", "", file)] = {"num_bytes": size}
    return sizes


def source_of(config: Config) -> str:
    """The data as an error message names it."""
    if config.data.name is not None:
        return f"data.name={config.data.name}"
    return f"data.path={config.data.path or 'null (the standard library)'}"


def check_documents(config: Config, count: int, held_out: int) -> None:
    """Raise ConfigError where there are no documents, or none to train on."""
    if count == 0:
        raise ConfigError(f"{source_of(config)} holds no documents; name data that is not empty")
    if count == held_out:  # or all are equal
        raise ConfigError(
            f"data.valid_fraction={config.data.valid_fraction} of the {count} documents of "
            f"{source_of(config)} leaves none to train on; lower it, or add documents that differ"
        )


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the model has fewer tokens than the tokenizer."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the "
            f"{tokenizer.vocab_size} tokens of data.tokenizer={config.data.tokenizer}; set "
            f"model.vocab_size={tokenizer.vocab_size} or more"
        )


def _cause(error: BaseException) -> str:
    """One line: what `datasets` wraps says less than what it wrapped."""
    return " ".join(str(error.__cause__ or error).split()) or "it holds nothing"
