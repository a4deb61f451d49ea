"""A hub data set, packed into sequences while it is read.

Documents are packed 1000 at a time, and the sequences shuffled in a buffer. Their order depends on
the seed and the number of ranks, and starting at a later step reads and drops what came before.
Where the ranks divide its number of files, each reads its own; otherwise each reads all and keeps a
part.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset

from train.config import Config, ConfigError
from train.data.sources import source_of
from train.data.tokenizer import Tokenizer
from train.data.tokens import token_type


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


def pack_args(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `pack` needs in addition to the documents."""
    length = config.model.seq_len + 1
    return {"tokenizer": tokenizer, "length": length, "dtype": token_type(tokenizer)}


class Stream(IterableDataset):
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
                pack, batched=True, remove_columns=[column], fn_kwargs=pack_args(config, tokenizer)
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
        # Not a plain loop over them, which shuffles differently in a worker process.
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
