"""Where documents come from: the standard library, local files or the hub; what is held out."""

import glob
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import datasets

from train.config import Config, ConfigError
from train.data.faults import UNREADABLE, last_line

FOLDER_KINDS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
"""What a folder is searched for. A file or a glob may name anything; an unknown suffix is text."""

NOT_CORPUS = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that hold no library source."""

SPLIT_SEED = 0
"""Not `train.seed`: runs with different seeds are compared on the same validation documents."""


def load_documents(
    config: Config,
) -> tuple[datasets.Dataset | datasets.IterableDataset, datasets.Dataset]:
    """Training and validation documents, one string column each; streamed data is not read yet,
    but for its validation documents. A single local document is all training.

    Raises ConfigError.
    """
    datasets.disable_progress_bars()  # every rank would draw its own
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong, ConfigError says
    # Nor every retry of the hub's client, once for each rank.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if config.data.name is not None:
        return split_stream(config, _open_hub(config))
    documents = _open_local(config)
    if len(documents) == 0:
        raise ConfigError(f"{source_of(config)} holds no documents; name data that is not empty")
    if len(documents) == 1:
        return documents, documents.select([])
    try:
        parts = documents.train_test_split(test_size=config.data.valid_fraction, seed=SPLIT_SEED)
    except ValueError:
        raise ConfigError(
            f"data.valid_fraction={config.data.valid_fraction} of {len(documents)} documents "
            "leaves none to train on; lower it"
        ) from None
    return parts["train"], parts["test"]


def training_texts(config: Config) -> Iterator[str]:
    """The training documents without the validation documents. Raises ConfigError."""
    train, _ = load_documents(config)
    return (text for row in train for text in row.values() if text)


def split_stream(
    config: Config, documents: datasets.IterableDataset
) -> tuple[datasets.IterableDataset, datasets.Dataset]:
    """The documents of a stream, unread, without its first `data.valid_documents`, and these."""
    held_out = config.data.valid_documents
    try:
        first = list(documents.take(held_out + 1))
    except UNREADABLE as error:
        raise ConfigError(f"{source_of(config)} cannot be read: {last_line(error)}") from None
    if not first:
        raise ConfigError(f"{source_of(config)} holds no documents; name data that is not empty")
    column = config.data.text_column
    if column not in first[0]:
        raise _no_column(config, list(first[0]))
    kinds = {type(row[column]).__name__ for row in first} - {"NoneType"}
    if kinds != {"str"}:
        raise _not_text(config, " and ".join(sorted(kinds)) or "nothing")
    if len(first) <= held_out:
        raise ConfigError(
            f"{source_of(config)} holds {len(first)} documents and "
            f"data.valid_documents={held_out} of them leave none to train on; lower it"
        )
    valid = [row[column] for row in first[:held_out]]
    # Left out by their text and not by `skip`: where ranks read different files, what that skips
    # depends on the version of `datasets`; it also stops the files from being shuffled, and lets
    # copies of validation documents through.
    train = documents.select_columns(column).filter(
        _is_new, input_columns=column, fn_kwargs={"known": frozenset(valid)}
    )
    return train, datasets.Dataset.from_dict({column: valid})


def _is_new(text: str, known: frozenset[str]) -> bool:
    return text not in known


def _open_local(config: Config) -> datasets.Dataset:
    kind, files = data_files(config.data.path)
    options = {"sample_by": "document", "encoding_errors": "replace"} if kind == "text" else {}
    names = [glob.escape(file) for file in files]  # `datasets` would expand a [ or * again
    try:
        documents = datasets.load_dataset(kind, data_files=names, split="train", **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, StopIteration) as error:
        raise ConfigError(
            f"{source_of(config)} cannot be read as {kind}: {_cause(error)}"
        ) from None
    column = "text" if kind == "text" else config.data.text_column
    if column not in documents.column_names:
        raise _no_column(config, documents.column_names)
    feature = documents.features[column]
    kind_found = getattr(feature, "dtype", "values of several kinds")
    if kind_found not in ("string", "large_string"):
        raise _not_text(config, kind_found)
    return documents.select_columns(column)


def _open_hub(config: Config) -> datasets.IterableDataset:
    data = config.data
    try:
        return datasets.load_dataset(data.name, data.subset, split=data.split, streaming=True)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ConfigError(
            f"{source_of(config)} data.subset={data.subset} data.split={data.split} cannot be "
            f"opened on the hub: {_cause(error)}"
        ) from None


def data_files(path: str | None) -> tuple[str, list[str]]:
    """The kind of local data (text, json or parquet) and its files, sorted. Raises ConfigError."""
    if path is None:
        files = _standard_library()
        if not files:
            raise ConfigError("data.path=null: this Python has no library source; set data.path")
        return "text", list(map(str, files))
    found = Path(path).expanduser()
    if found.is_dir():
        files = [p for p in found.rglob("*") if _suffix(p) in FOLDER_KINDS and p.is_file()]
        files = [p for p in files if not _hidden(p.relative_to(found))]
        wanted = f"no {', '.join(FOLDER_KINDS)} file in this folder; name a file or a glob"
    else:
        names = [str(found)] if found.exists() else glob.glob(str(found), recursive=True)
        files = [p for p in map(Path, names) if p.is_file()]
        wanted = "no such file; name a file, a folder or a glob"
    if not files:
        raise ConfigError(f"data.path={path}: {wanted}")
    kinds = sorted({FOLDER_KINDS.get(_suffix(p), "text") for p in files})
    if len(kinds) > 1:
        raise ConfigError(
            f"data.path={path} mixes {' and '.join(kinds)} files; name one kind with a glob, "
            "such as 'folder/**/*.jsonl'"
        )
    return kinds[0], sorted(map(str, files))


def _standard_library() -> list[Path]:
    files: list[Path] = []
    for folder, inner, names in os.walk(sysconfig.get_paths()["stdlib"]):
        inner[:] = [name for name in inner if name not in NOT_CORPUS]  # do not even walk those
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix


def source_of(config: Config) -> str:
    """The data as an error message names it."""
    if config.data.name is not None:
        return f"data.name={config.data.name}"
    return f"data.path={config.data.path or 'null (the standard library)'}"


def _no_column(config: Config, columns: list[str]) -> ConfigError:
    return ConfigError(
        f"data.text_column={config.data.text_column} is not in {source_of(config)}; its columns "
        f"are {', '.join(columns)}"
    )


def _not_text(config: Config, kind: str) -> ConfigError:
    return ConfigError(
        f"data.text_column={config.data.text_column} of {source_of(config)} holds {kind}, not "
        "text; name a column of strings"
    )


def _cause(error: BaseException) -> str:
    """One line: what `datasets` wraps says less than what it wrapped."""
    return " ".join(str(error.__cause__ or error).split()) or "it holds nothing"
