"""Text to batches: documents, packed into sequences, in an order that seed and step decide.

    corpus = load(config)
    for batch in corpus.train_batches(rank, world_size, start_step=0): ...

Documents are joined, each followed by the end-of-document token, and cut into sequences of
`seq_len` + 1 tokens: the inputs, and the same shifted by one as labels. What is left over at the
end, less than a sequence, is dropped. A hash of its text decides whether a document is trained on
or held out.

Local data (by default the source of Python's standard library) is packed once into the cache of
`datasets`. Its sequences have numbers, and a permutation for each epoch: sample g of the run is at
place g % n of permutation g // n. Which samples a step takes depends neither on the number of
ranks nor on the size of micro-batches, and any step can be the first at no cost.

A hub data set is streamed: packed on the fly, 1000 documents at a time, and shuffled in a buffer.
Its order depends on the seed and the number of ranks, and starting at a later step reads and drops
what came before. Where the ranks divide its number of files, each reads its own; otherwise each
reads all and keeps a part.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import IterableDataset as TorchIterableDataset

from train.config import Config, ConfigError
from train.data.faults import explained
from train.data.fingerprint import of_stream
from train.data.packed import load_packed, token_type
from train.data.sources import (
    check_documents,
    load_stream,
    local_files,
    quiet,
    readable,
    source_of,
)
from train.data.tokenizer import Tokenizer, is_local, load_tokenizer
from train.safety import workers

PREFETCH = 4
"""Batches that each worker keeps ready."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch; every tensor is int64 [micro_batch, seq_len]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    """The token that follows each one."""
    positions: torch.Tensor
    """Position within the document: 0 for a sequence's first token and after each `eod`."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; the copy runs beside the host where memory is pinned."""
        return Batch(*(t.to(device, non_blocking=True) for t in self._tensors()))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader."""
        return Batch(*(t.pin_memory() for t in self._tensors()))

    def _tensors(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class Corpus:
    """Data that is ready to train on; `load` makes it."""

    config: Config
    tokenizer: Tokenizer
    train: datasets.Dataset | datasets.IterableDataset
    """Packed sequences (local data), or documents (streamed data)."""
    valid: datasets.Dataset
    """Packed sequences."""
    about: str
    """Source, kind and documents, in words."""
    contents: dict[str, Any]
    """What of the data must be the same where a run is resumed; `train.data.fingerprint`."""

    def describe(self) -> str:
        """One line for the start of a run: what is read, how much, by which tokenizer."""
        sequences = f"{len(self.valid):,} validation sequences"
        if isinstance(self.train, datasets.Dataset):
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
        if isinstance(self.train, datasets.Dataset):
            return _loader(
                config,
                self.train,
                sampler=_Order(config, len(self.train), rank, world_size, start_step),
                collate_fn=partial(make_batch, eod=eod),
                num_workers=config.data.workers,
            )
        # Several workers would each read their own files, and the order depend on their number.
        return _loader(
            config,
            _Stream(config, self.tokenizer, self.train, rank, world_size, start_step),
            collate_fn=partial(make_batch, eod=eod),
            num_workers=min(config.data.workers, 1),
        )

    def valid_batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """Micro-batches of one rank in one validation, the same each time.

        Together the ranks see `train.valid_batches` global batches, or as many whole ones as there
        are validation sequences for; where there are too few for one, some are repeated to fill it.
        """
        n = len(self.valid)
        whole = max(1, n // self.config.global_batch(world_size))
        for step in range(min(self.config.train.valid_batches, whole)):
            for numbers in _sample_numbers(self.config, step, rank, world_size):
                yield make_batch(self.valid[[g % n for g in numbers]], eod=self.tokenizer.eod)


def check(config: Config) -> None:
    """Find what is wrong with the data keys before anything is loaded. Raises ConfigError."""
    if config.data.name is None:
        local_files(config)
    if config.data.tokenizer == "bytes" or is_local(config.data.tokenizer):
        _check_vocabulary(config, load_tokenizer(config.data.tokenizer, config.data.eod_token))


def load(config: Config) -> Corpus:
    """Read, pack and split the configured data.

    Local data is packed by the first process that calls, and found in the cache of `datasets` by
    the others and by later ones. Raises ConfigError.
    """
    quiet()
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eod_token)
    _check_vocabulary(config, tokenizer)
    if config.data.name is None:
        return _load_local(config, tokenizer)
    return _load_stream(config, tokenizer)


def _load_local(config: Config, tokenizer: Tokenizer) -> Corpus:
    data, found = config.data, local_files(config)
    with readable(config, found.kind):
        packed = load_packed(
            *(found, data.text_column, data.valid_fraction),
            *(tokenizer, config.model.seq_len + 1),
        )
    train, valid, facts = packed.train, packed.valid, packed.facts
    count = facts.documents
    check_documents(config, count, facts.valid_documents)
    if count == 1:  # such as one long text file: hold its last sequences out instead
        both, held_out = train, math.ceil(len(train) * data.valid_fraction)
        train = both.select(range(len(both) - held_out))
        valid = both.select(range(len(both) - held_out, len(both)))
    training = count - facts.valid_documents
    _check_not_empty(config, train, f"the {training} training document(s)", "add text")
    advice = f"raise data.valid_fraction={data.valid_fraction}"
    _check_not_empty(config, valid, f"the {facts.valid_documents} validation document(s)", advice)
    source = data.path or "the standard library of Python"
    about = f"{source}: {len(found.files):,} {found.kind} file(s), {count:,} document(s)"
    if facts.replaced:
        about += f", {facts.replaced:,} of them with U+FFFD for what is no UTF-8"
    if found.left_out:
        about += f"; left out: {found.left_out}"
    contents = {
        "documents": count,
        "text": facts.text,
        "training sequences": len(train),
        "validation sequences": len(valid),
    }
    return Corpus(config, tokenizer, train, valid, about, contents)


def _load_stream(config: Config, tokenizer: Tokenizer) -> Corpus:
    data = config.data
    train, documents = load_stream(config)
    args = _pack_args(config, tokenizer)
    tokens = pack(documents[:], **args)["tokens"]
    kind = datasets.List(datasets.Value(args["dtype"]), length=args["length"])
    valid = datasets.Dataset.from_dict(
        {"tokens": tokens}, features=datasets.Features({"tokens": kind})
    ).with_format("numpy")
    advice = f"raise data.valid_documents={data.valid_documents}"
    _check_not_empty(config, valid, f"the {len(documents)} validation document(s)", advice)
    about = f"{data.name}, streamed: subset {data.subset}, split {data.split}"
    return Corpus(config, tokenizer, train, valid, about, of_stream(train, documents))


def make_batch(rows: dict[str, np.ndarray], eod: int) -> Batch:
    """The batch of `rows["tokens"]`, integers [micro_batch, seq_len + 1]."""
    tokens = rows["tokens"].astype(np.int64)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    places = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)
    starts = np.zeros_like(inputs)
    starts[:, 1:] = np.where(inputs[:, :-1] == eod, places[:, 1:], 0)
    positions = places - np.maximum.accumulate(starts, axis=1)
    # Copies, since a tensor is written to its own memory and these are views of one array.
    return Batch(*(torch.from_numpy(a.copy()) for a in (inputs, labels, positions)))


def pack(
    batch: dict[str, list[str | None]], tokenizer: Tokenizer, length: int, dtype: str
) -> dict[str, np.ndarray]:
    """Documents, in the one column of `batch`, to `tokens` [sequences, length] of `dtype`.

    Empty and missing documents are left out; so is what remains at the end.
    """
    (texts,) = batch.values()
    pieces = [np.empty(0, dtype)]
    for ids in tokenizer.encode([text for text in texts if text]):
        pieces += [ids.astype(dtype), np.array([tokenizer.eod], dtype)]
    flat = np.concatenate(pieces)
    return {"tokens": flat[: len(flat) // length * length].reshape(-1, length)}


class _Order(Sampler[list[int]]):
    """Places in the packed data, a micro-batch at a time, forever."""

    def __init__(self, config: Config, n: int, rank: int, world_size: int, start_step: int) -> None:
        self.config, self.n = config, n
        self.rank, self.world_size, self.start_step = rank, world_size, start_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(self.start_step):
            for numbers in _sample_numbers(self.config, step, self.rank, self.world_size):
                yield [self._place(g) for g in numbers]

    def _place(self, g: int) -> int:
        epoch, place = divmod(g, self.n)
        return int(_permutation(self.config.train.seed, epoch, self.n)[place])


class _Stream(TorchIterableDataset):
    """Packed sequences of streamed documents, a micro-batch at a time, forever."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        documents: datasets.IterableDataset,
        rank: int,
        world_size: int,
        start_step: int,
    ) -> None:
        column = config.data.text_column
        self.sequences = (
            split_dataset_by_node(documents, rank, world_size)
            .map(
                pack, batched=True, remove_columns=[column], fn_kwargs=_pack_args(config, tokenizer)
            )
            .shuffle(seed=config.train.seed, buffer_size=config.data.shuffle_buffer)
        )
        self.config = config
        self.skip = start_step * config.accumulation(world_size) * config.train.micro_batch

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        # An exact resume reads again: the `state_dict` of `datasets` forgets its shuffle buffer.
        rows = islice(self._rows(), self.skip, None)
        while True:
            yield {"tokens": np.stack(list(islice(rows, self.config.train.micro_batch)))}

    def epoch(self, number: int) -> Iterator[np.ndarray]:
        """One pass over this rank's documents: sequences, integers [seq_len + 1]."""
        self.sequences.set_epoch(number)
        # Not a plain loop over them, which shuffles otherwise in a worker process than outside.
        for rows in self.sequences.iter(batch_size=1):
            yield np.asarray(rows["tokens"][0])

    def _rows(self) -> Iterator[np.ndarray]:
        for number in count():
            empty = True
            for row in self.epoch(number):
                empty = False
                yield row
            if empty:
                raise ConfigError(
                    f"{source_of(self.config)} leaves this rank no whole sequence of "
                    f"model.seq_len={self.config.model.seq_len}; start fewer ranks or lower "
                    "model.seq_len"
                )


def _loader(config: Config, source: Any, num_workers: int, **options: Any) -> Iterator[Batch]:
    loader: DataLoader = DataLoader(
        source,
        batch_size=None,  # the source is asked for whole micro-batches
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=_start_worker,
        # It would draw from the training's otherwise, once more in a run that was resumed.
        generator=torch.Generator(),
        pin_memory=config.train.device != "cpu" and torch.cuda.is_available(),
        **options,
    )
    return explained(iter(loader), source_of(config))


def _start_worker(worker: int) -> None:
    # The threads of the tokenizers library do not survive the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    workers.begin()


def _sample_numbers(config: Config, step: int, rank: int, world_size: int) -> Iterator[range]:
    """The run's sample numbers in each of a rank's micro-batches of one step."""
    size = config.train.micro_batch
    for micro in range(config.accumulation(world_size)):
        first = step * config.global_batch(world_size) + (micro * world_size + rank) * size
        yield range(first, first + size)


@lru_cache(maxsize=2)  # a batch can reach over the end of an epoch
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def _pack_args(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    length = config.model.seq_len + 1
    return {"tokenizer": tokenizer, "length": length, "dtype": token_type(tokenizer)}


def _check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the "
            f"{tokenizer.vocab_size} tokens of data.tokenizer={config.data.tokenizer}; set "
            f"model.vocab_size={tokenizer.vocab_size} or more"
        )


def _check_not_empty(config: Config, packed: datasets.Dataset, what: str, advice: str) -> None:
    if len(packed) == 0:
        raise ConfigError(
            f"{source_of(config)}: {what} hold no whole sequence of "
            f"model.seq_len={config.model.seq_len}; {advice} or lower model.seq_len"
        )
