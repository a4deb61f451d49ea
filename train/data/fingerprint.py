"""Whether a run that is resumed reads what it was trained on: a fingerprint of data and tokenizer.

    saved = corpus.fingerprint()                    # plain values, kept with a checkpoint
    for line in differences(saved, corpus.fingerprint()): ...

It is of contents, so the same data at another path has the same one. A stream is not read in full
before training: its fingerprint is of its files' names and sizes and of the documents held out.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import datasets

from train.data import split

HASHES = {
    "text": "the text of the documents",
    "files": "the files of the stream",
    "held-out text": "the text of the documents held out",
    "tokenizer": "the tokenizer or its end-of-document token",
}
"""Values that mean nothing to a reader, in words."""


def of_stream(stream: datasets.IterableDataset, held_out: datasets.Dataset) -> dict[str, Any]:
    """The fingerprint of a stream without its tokenizer's part."""
    sizes = stream.info.download_checksums or {}
    named = [f"{PurePosixPath(file).name} {about['num_bytes']}" for file, about in sizes.items()]
    (texts,) = held_out[:].values()
    return {
        "files": split.digest(f"{one}\n" for one in named).hex(),
        "number of files": stream.num_shards,
        "documents held out": len(texts),
        "held-out text": split.digest(f"{text}\0" for text in texts).hex(),
    }


def of_mixture(weights: Sequence[float], sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fingerprint of several sources together: the weight and the contents of each."""
    found: dict[str, Any] = {}
    for number, (weight, contents) in enumerate(zip(weights, sources, strict=True), 1):
        of_one = {"weight": weight / sum(weights), **contents}
        found |= {f"source {number}: {key}": value for key, value in of_one.items()}
    return found


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; nothing where the data is the same."""
    found = []
    for key in {**there, **now}:
        before, after = there.get(key), now.get(key)
        if before == after:
            continue
        source, colon, what = key.rpartition(": ")
        if what in HASHES:
            found.append(f"{source}{colon}{HASHES[what]} changed")
        else:
            found.append(f"{key}: {_shown(before)} there, {_shown(after)} now")
    return found


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
