"""Where documents come from: the standard library, local files or the hub; what is held out."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import fsspec
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from train.config import Config, ConfigError
from train.data import split
from train.data.cache import about_the_cache
from train.data.faults import UNREADABLE, Unreadable, last_line
from train.data.files import LocalFiles, find_files, kind_of
from train.data.readers import read_documents
from train.data.survey import documents_of, survey

OWN_READERS = {"json": Json, "parquet": Parquet}
"""Kinds of hub data sets whose files are read like local ones; `datasets` reads the others."""


def quiet() -> None:
    """Nothing of `datasets` on the terminal: every rank would say it."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong, ConfigError says
    # Nor every retry of the hub's client, once for each rank.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def local_files(config: Config) -> LocalFiles:
    """The files that `data.path` means. Raises ConfigError."""
    return find_files(config.data.path, config.data.split)


def load_stream(config: Config) -> tuple[datasets.IterableDataset, datasets.Dataset]:
    """Training documents of the hub data set, not read yet, and validation documents: one string
    column each. Raises ConfigError."""
    quiet()
    return split_stream(config, _open_hub(config))


def training_texts(config: Config) -> Iterator[str]:
    """The training documents without the validation documents, long ones in pieces.

    Raises ConfigError.
    """
    if config.data.name is not None:
        train, _ = load_stream(config)
        try:
            yield from (text for row in train for text in row.values() if text)
        except UNREADABLE as error:
            raise ConfigError(f"{source_of(config)} cannot be read: {last_line(error)}") from None
        return
    found = local_files(config)
    with readable(config, found.kind):
        about = survey(found, config.data.text_column, config.data.valid_fraction)
        check_documents(config, len(about.is_valid), int(about.is_valid.sum()))
        documents = documents_of(found, config.data.text_column)
        for document, is_valid in zip(documents, about.is_valid, strict=True):
            if not is_valid:
                yield from document


@contextmanager
def readable(config: Config, kind: str) -> Iterator[None]:
    """What cannot be read inside is a ConfigError that names the data, the file and the record."""
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
    if len(held_out) < data.valid_documents:  # that was all there is
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
        except Exception:  # whatever the file system raises: it is only for the fingerprint
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
    if count == held_out:  # or all the same
        raise ConfigError(
            f"data.valid_fraction={config.data.valid_fraction} of the {count} documents of "
            f"{source_of(config)} leaves none to train on; lower it, or add documents that differ"
        )


def _cause(error: BaseException) -> str:
    """One line: what `datasets` wraps says less than what it wrapped."""
    return " ".join(str(error.__cause__ or error).split()) or "it holds nothing"
