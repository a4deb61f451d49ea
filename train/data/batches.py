"""Text to batches: documents, packed into sequences, in an order that follows from seed and step.

    corpus = load(config)
    for batch in corpus.train_batches(rank, world_size, start_step=0): ...

Documents are joined, each followed by the end-of-document token, and cut into sequences of
`seq_len` + 1 tokens: the inputs, and the same shifted by one as labels. What is left over at the
end, less than a sequence, is dropped. A hash of its text decides whether a document is trained on
or held out.

Local data (by default the source of Python's standard library) is made into tokens once, in the
cache of `datasets` or by `scripts/prepare_data.py`. Its sequences have numbers, and `order.py` says
which of them is sample g of the run. Which samples a step takes depends neither on the number of
ranks nor on the size of micro-batches, and any step can be the first at no cost. With several
weighted sources each gets its share of the samples.

A hub data set is streamed: `stream.py`.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

from models.documents import Documents
from train.config import Config, ConfigError
from train.data import prepared
from train.data.faults import explained
from train.data.fingerprint import of_mixture, of_stream
from train.data.order import Mixed, Order, Samples, Shuffled, Spread, in_turn, sample_numbers
from train.data.packed import load_packed
from train.data.prepared import About
from train.data.sources import (
    check_documents,
    check_vocabulary,
    load_stream,
    local_files,
    local_text,
    quiet,
    readable,
    source_of,
    sources_of,
)
from train.data.stream import Stream, pack, pack_args
from train.data.tokenizer import Tokenizer, is_local, load_tokenizer
from train.data.tokens import Joined, Sequences
from train.safety import workers

PREFETCH = 4
"""Batches that each worker keeps ready."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch; tokens and labels are int64 [micro_batch, seq_len]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    """The token that follows each one."""
    documents: Documents
    """One begins with every sequence, and after every `eod`."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; the copy is asynchronous where memory is pinned."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader."""
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        bounds, longest = self.documents
        return Batch(move(self.tokens), move(self.labels), Documents(move(bounds), longest))


@dataclass(frozen=True)
class Corpus:
    """Data ready to train on; `load` makes it."""

    config: Config
    tokenizer: Tokenizer
    train: Sequences | Joined | datasets.IterableDataset
    """Sequences (local data), or documents (streamed data)."""
    valid: Sequences | Joined
    order: Order
    """The order in which local data is trained on."""
    valid_order: Order
    about: str
    """Source, kind and documents, in words."""
    contents: dict[str, Any]
    """What must be the same of the data when a run is resumed; `train.data.fingerprint`."""

    def describe(self) -> str:
        """One line for the start of a run: what is read, how much, by which tokenizer."""
        sequences = f"{len(self.valid):,} validation sequences"
        if not isinstance(self.train, datasets.IterableDataset):
            sequences = f"{len(self.train):,} training and {sequences}"
        name = self.config.data.tokenizer
        return f"{self.about}; {sequences}; tokenizer {name}, {self.tokenizer.vocab_size:,} tokens"

    def fingerprint(self) -> dict[str, Any]:
        """What `train.data.fingerprint.differences` compares: plain values, for JSON."""
        return self.contents | {"tokenizer": self.tokenizer.digest}

    def train_batches(self, rank: int, world_size: int, start_step: int = 0) -> Iterator[Batch]:
        """Micro-batches of one rank from a step on, forever: `config.accumulation` per step.

        Streamed data that leaves this rank without a single sequence raises ConfigError.
        """
        config, eod = self.config, self.tokenizer.eod
        if not isinstance(self.train, datasets.IterableDataset):
            return _loader(
                config,
                self.train,
                sampler=Samples(config, self.order, rank, world_size, start_step),
                collate_fn=partial(make_batch, eod=eod),
                num_workers=config.data.workers,
            )
        # Several workers would each read their own files, and the order would depend on their
        # number.
        return _loader(
            config,
            Stream(config, self.tokenizer, self.train, rank, world_size, start_step),
            collate_fn=partial(make_batch, eod=eod),
            num_workers=min(config.data.workers, 1),
        )

    def valid_batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """Micro-batches of one rank in one validation, the same each time.

        Together the ranks see `train.valid_batches` global batches, or as many whole ones as there
        are validation sequences for; where there are too few for one, some are repeated to fill it.
        Of a mixture each source has its share, and one that is too small for it is repeated.
        """
        whole = max(1, len(self.valid) // self.config.global_batch(world_size))
        for step in range(min(self.config.train.valid_batches, whole)):
            for numbers in sample_numbers(self.config, step, rank, world_size):
                rows = self.valid[[self.valid_order(g) for g in numbers]]
                yield make_batch(rows, eod=self.tokenizer.eod)


def check(config: Config) -> None:
    """Check the data keys before anything is loaded. Raises ConfigError."""
    tokenizer = None
    if config.data.tokenizer == "bytes" or is_local(config.data.tokenizer):
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.eod_token)
        check_vocabulary(config, tokenizer)
    if config.data.name is None:
        with _named_mixture(config):
            for one in sources_of(config):
                if prepared.is_prepared(one.data.path):
                    _about_prepared(one, tokenizer)
                else:
                    local_files(one)


def load(config: Config) -> Corpus:
    """Read, pack and split the configured data.

    Local data is packed by the first process that calls, and found in the cache of `datasets` by
    the others and by later ones. Raises ConfigError.
    """
    quiet()
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eod_token)
    check_vocabulary(config, tokenizer)
    if config.data.name is not None:
        return _load_stream(config, tokenizer)
    if not config.data.mixture:
        return _load_local(config, tokenizer)
    return _load_mixture(config, tokenizer)


def _load_local(config: Config, tokenizer: Tokenizer) -> Corpus:
    data, note = config.data, ""
    if prepared.is_prepared(data.path):
        folder, about = prepared.folder_of(data.path), _about_prepared(config, tokenizer)
        note = f", prepared in {data.path}"
    else:
        found = local_files(config)
        with readable(config, found.kind):
            folder, about = load_packed(local_text(config, found), tokenizer, config)
        if found.left_out:
            note = f"; left out: {found.left_out}"
    train, valid = prepared.sequences(folder, about, config.model.seq_len + 1)
    count = about.documents
    check_documents(config, count, about.valid_documents)
    if count == 1:  # for example one long text file: hold its last sequences out instead
        both, held_out = train, math.ceil(len(train) * data.valid_fraction)
        train = both.part(0, len(both) - held_out)
        valid = both.part(len(both) - held_out, held_out)
    training = count - about.valid_documents
    _check_not_empty(config, train, f"the {training} training document(s)", "add text")
    advice = f"raise data.valid_fraction={data.valid_fraction}"
    _check_not_empty(config, valid, f"the {about.valid_documents} validation document(s)", advice)
    line = f"{about.source}, {count:,} document(s)"
    if about.replaced:
        line += f", {about.replaced:,} of them with U+FFFD for what is not UTF-8"
    contents = {
        "documents": count,
        "text": about.text,
        "training sequences": len(train),
        "validation sequences": len(valid),
    }
    return Corpus(
        *(config, tokenizer, train, valid),
        *(Shuffled(len(train), config.train.seed), in_turn(len(valid))),
        *(line + note, contents),
    )


def _about_prepared(config: Config, tokenizer: Tokenizer | None) -> About:
    path = config.data.path
    assert path is not None
    about = prepared.read(prepared.folder_of(path))
    prepared.check_keys(path, about, config, tokenizer)
    return about


def _load_mixture(config: Config, tokenizer: Tokenizer) -> Corpus:
    weights = [*config.data.mixture.values()]
    with _named_mixture(config):
        sources = [_load_local(one, tokenizer) for one in sources_of(config)]
    train, valid = (
        Joined([one for one in side if isinstance(one, Sequences)])
        for side in ([s.train for s in sources], [s.valid for s in sources])
    )
    sizes, valid_sizes = ([len(one) for one in joined.sources] for joined in (train, valid))
    share = [weight / sum(weights) for weight in weights]
    about = "; ".join(f"{s:.2%} of {one.about}" for s, one in zip(share, sources, strict=True))
    return Corpus(
        *(config, tokenizer, train, valid),
        *(Mixed(sizes, weights, config.train.seed), Spread(valid_sizes, weights)),
        *(about, of_mixture(weights, [one.contents for one in sources])),
    )


@contextmanager
def _named_mixture(config: Config) -> Iterator[None]:
    """Marks an error of one of several sources: it names data.path, which the user has not set."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.mixture: {error}" if config.data.mixture else str(error)) from None


def _load_stream(config: Config, tokenizer: Tokenizer) -> Corpus:
    data = config.data
    train, documents = load_stream(config)
    args = pack_args(config, tokenizer)
    tokens = pack(documents[:], **args)["tokens"]
    valid = Sequences(args["length"], arrays=[tokens.reshape(-1)])
    advice = f"raise data.valid_documents={data.valid_documents}"
    _check_not_empty(config, valid, f"the {len(documents)} validation document(s)", advice)
    about = f"{data.name}, streamed: subset {data.subset}, split {data.split}"
    return Corpus(
        *(config, tokenizer, train, valid),
        *(in_turn(0), in_turn(len(valid)), about, of_stream(train, documents)),
    )


def make_batch(rows: dict[str, np.ndarray], eod: int) -> Batch:
    """The batch of `rows["tokens"]`, integers [micro_batch, seq_len + 1]."""
    tokens = rows["tokens"].astype(np.int64)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    begins = np.ones(inputs.shape, bool)
    begins[:, 1:] = inputs[:, :-1] == eod
    bounds = np.append(np.flatnonzero(begins), inputs.size).astype(np.int32)
    documents = Documents(torch.from_numpy(bounds), int(np.diff(bounds).max()))
    # Copies, since a tensor is written to its own memory and these are views of one array.
    return Batch(torch.from_numpy(inputs.copy()), torch.from_numpy(labels.copy()), documents)


def _loader(config: Config, source: Any, num_workers: int, **options: Any) -> Iterator[Batch]:
    loader: DataLoader = DataLoader(
        source,
        batch_size=None,  # the source is asked for whole micro-batches
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=_start_worker,
        # Otherwise it would draw from the training generator, and once more in a resumed run.
        generator=torch.Generator(),
        pin_memory=config.train.device != "cpu" and torch.cuda.is_available(),
        **options,
    )
    return explained(iter(loader), source_of(config))


def _start_worker(worker: int) -> None:
    # The threads of the tokenizers library do not survive the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    workers.begin()


def _check_not_empty(config: Config, packed: Sequences, what: str, advice: str) -> None:
    if len(packed) == 0:
        raise ConfigError(
            f"{source_of(config)}: {what} hold no whole sequence of "
            f"model.seq_len={config.model.seq_len}; {advice} or lower model.seq_len"
        )
