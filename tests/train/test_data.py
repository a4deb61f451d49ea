"""The data: packing, the order of samples, the held-out split, and one line for bad input.

What files people have is in test_data_files.py.
"""

import hashlib
import json
import os
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from tests.support.ranks import Training
from tests.support.tiny import argv
from train.config import Config, ConfigError, load
from train.data import batches as data
from train.data import files, sources
from train.data.survey import Files, limit_of, survey
from train.data.tokenizer import ByteTokenizer
from train.data.tokens import Joined, Sequences

CONFIG = Path(__file__).parents[2] / "configs" / "demo_cpu.yaml"
EOD = ByteTokenizer.eod


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def texts() -> list[str]:
    """40 documents of different lengths; each holds its number and so is unlike the others."""
    return [f"document {i}: " + f"word{i} é " * (5 + i % 7) for i in range(40)]


@pytest.fixture
def jsonl(tmp_path, texts) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "other": 1}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, values: list, column: str = "text") -> Path:
    pa.parquet.write_table(pa.table({column: values}), path)
    return path


def configure(*overrides: str) -> Config:
    """A small config: sequences of 16 tokens, 4 to a step, no worker processes."""
    small = ["model.seq_len=16", "train.micro_batch=2", "train.global_batch=4", "data.workers=0"]
    return load(CONFIG, [*small, "data.valid_fraction=0.2", *overrides])


def rows(batches) -> list[tuple[int, ...]]:
    """The sequences of some batches, as tuples that compare and hash."""
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


def steps(config: Config, corpus: data.Corpus, first: int, number: int, world_size: int = 1):
    """Sequences of each step, those of all ranks together and sorted."""
    micro = config.accumulation(world_size)
    ranks = [
        list(islice(corpus.train_batches(rank, world_size, first), number * micro))
        for rank in range(world_size)
    ]
    return [
        sorted(row for batches in ranks for row in rows(batches[s * micro : (s + 1) * micro]))
        for s in range(number)
    ]


# Packing


def test_pack_keeps_every_document_in_order_with_its_end(texts):
    length = 17
    packed = data.pack({"text": [None, "", *texts]}, ByteTokenizer(), length, "uint16")["tokens"]
    joined = b"".join(text.encode() + b"\0" for text in texts)
    expected = [EOD if byte == 0 else byte for byte in joined]
    assert packed.shape == (len(expected) // length, length)
    assert packed.dtype == np.uint16
    assert packed.reshape(-1).tolist() == expected[: packed.size]


def test_batch_shifts_labels_and_documents_begin_after_each_end():
    tokens = np.array([[7, 8, EOD, 9, EOD, EOD, 5], [1, 2, 3, 4, 5, 6, EOD]], dtype=np.uint16)
    batch = data.make_batch({"tokens": tokens}, EOD)
    assert batch.tokens.tolist() == [[7, 8, EOD, 9, EOD, EOD], [1, 2, 3, 4, 5, 6]]
    assert batch.labels.tolist() == [[8, EOD, 9, EOD, EOD, 5], [2, 3, 4, 5, 6, EOD]]
    assert batch.documents.bounds.tolist() == [0, 3, 5, 6, 12]
    assert batch.documents.longest == 6
    assert {t.dtype for t in (batch.tokens, batch.labels)} == {torch.int64}
    assert batch.documents.bounds.dtype == torch.int32


def test_batches_continue_the_packed_text(jsonl, texts):
    config = configure(f"data.path={jsonl}")
    corpus = data.load(config)
    batch = next(corpus.train_batches(0, 1))
    assert batch.tokens.shape == batch.labels.shape == (2, 16)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    moved = batch.to("cpu")
    assert torch.equal(moved.documents.bounds, batch.documents.bounds)
    assert moved.documents.longest == batch.documents.longest


# Order


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (1, 1), (2, 1), (2, 2), (4, 1)])
def test_a_step_takes_the_same_samples_on_any_number_of_ranks(jsonl, world_size, micro_batch):
    reference = configure(f"data.path={jsonl}")
    config = configure(f"data.path={jsonl}", f"train.micro_batch={micro_batch}")
    expected = steps(reference, data.load(reference), 0, 40)  # more than an epoch
    assert steps(config, data.load(config), 0, 40, world_size) == expected


def test_a_later_start_equals_dropping_the_steps_before(jsonl):
    config = configure(f"data.path={jsonl}")
    corpus = data.load(config)
    everything = rows(islice(corpus.train_batches(1, 2), 60))
    assert len(corpus.train) < 60 * 4  # reaches into the second epoch
    assert rows(islice(corpus.train_batches(1, 2, start_step=13), 47)) == everything[26:]


def test_an_epoch_holds_every_sequence_once_and_the_next_is_in_another_order(jsonl):
    config = configure(f"data.path={jsonl}", "train.micro_batch=1", "train.global_batch=1")
    corpus = data.load(config)
    n = len(corpus.train)
    stream = rows(islice(corpus.train_batches(0, 1), 2 * n))
    first, second = stream[:n], stream[n:]
    whole = Counter(tuple(row) for row in corpus.train[:]["tokens"][:, :-1].tolist())
    assert Counter(first) == Counter(second) == whole
    assert first != second


def test_the_seed_decides_the_order_and_nothing_else(jsonl):
    def run(seed: int) -> tuple[list, list]:
        corpus = data.load(configure(f"data.path={jsonl}", f"train.seed={seed}"))
        return rows(islice(corpus.train_batches(0, 1), 20)), rows(corpus.valid_batches(0, 1))

    assert run(1)[0] == run(1)[0]
    assert run(1)[0] != run(2)[0]
    assert run(1)[1] == run(2)[1]


def test_worker_processes_change_nothing(jsonl):
    expected = None
    for workers in (0, 1, 2):
        corpus = data.load(configure(f"data.path={jsonl}", f"data.workers={workers}"))
        stream = rows(islice(corpus.train_batches(0, 2, start_step=3), 30))
        expected = expected or stream
        assert stream == expected


# Validation


def held_out(texts: list[str], fraction: float = 0.2) -> list[str]:
    """By the definition: the first 8 bytes of a hash, as a share of all they can be."""
    hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    places = [int.from_bytes(one[:8], "big") / 2**64 for one in hashes]
    return [text for text, place in zip(texts, places, strict=True) if place < fraction]


def joined(texts: list[str]) -> str:
    return "".join(f"{text}\0" for text in texts)


def decoded(sequences: Sequences | Joined | datasets.IterableDataset) -> str:
    """The text of packed sequences, a NUL at the end of each document."""
    assert isinstance(sequences, Sequences)
    tokens = sequences[:]["tokens"].reshape(-1).tolist()
    return bytes(0 if token == EOD else token for token in tokens).decode("utf-8", "ignore")


def test_training_and_validation_documents_are_disjoint_and_complete(jsonl, texts):
    """Sequence by sequence: nothing of one side is on the other, and nothing is lost."""
    config = configure(f"data.path={jsonl}")
    corpus = data.load(config)
    valid = held_out(texts)
    train = [text for text in texts if text not in valid]
    assert 2 <= len(valid) <= 16
    for sequences, documents in ((corpus.train, train), (corpus.valid, valid)):
        expected = joined(documents).encode()
        assert decoded(sequences) == expected[: len(expected) // 17 * 17].decode("utf-8", "ignore")
    assert joined(list(sources.training_texts(config))) == joined(train)


def test_batches_of_either_side_hold_its_documents_alone(tmp_path):
    """A document is as long as a sequence, so each row is one and can be recognised."""
    texts = [f"document no {i:04}" for i in range(300)]
    config = configure(
        f"data.path={write_jsonl(tmp_path / 'a.jsonl', texts)}", "train.valid_batches=1000"
    )
    corpus = data.load(config)
    valid = set(held_out(texts))
    sides = [
        {ByteTokenizer().decode(row) for row in rows(batches)}
        for batches in (islice(corpus.train_batches(0, 1), 500), corpus.valid_batches(0, 1))
    ]
    assert sides[0] == set(texts) - valid
    assert len(valid) - 4 < len(sides[1]) <= len(valid)  # whole global batches
    assert sides[1] <= valid


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_the_share_held_out_is_near_what_is_asked_for(tmp_path, fraction):
    texts = [f"document {i}" for i in range(10_000)]
    found = files.find_files(str(write_jsonl(tmp_path / "a.jsonl", texts)))
    about = survey(Files(found.kind, found.files, "text"))
    is_valid = about.is_valid(limit_of(fraction, about))
    assert is_valid.mean() == pytest.approx(fraction, abs=4 * (fraction / 10_000) ** 0.5)


def test_the_split_stays_when_documents_are_added_or_moved(tmp_path, texts):
    def sides(documents: list[str]) -> tuple[set[str], set[str]]:
        path = write_jsonl(tmp_path / "a.jsonl", documents)
        train = set(sources.training_texts(configure(f"data.path={path}")))
        return train, set(documents) - train

    train, valid = sides(texts)
    more = [f"another document {i} " * 9 for i in range(40)]
    for documents in (texts[::-1], [*more, *texts], texts[3:], [*texts, *texts]):
        train_now, valid_now = sides(documents)
        assert not train & valid_now
        assert not valid & train_now
        assert train_now
        assert valid_now


def test_copies_of_a_document_are_on_one_side(tmp_path, texts):
    copies = [text for text in texts for _ in range(3)]
    path = write_jsonl(tmp_path / "a.jsonl", copies)
    seen = Counter(sources.training_texts(configure(f"data.path={path}")))
    assert set(seen.values()) == {3}
    assert len(seen) < len(texts)


def test_a_few_documents_leave_one_to_validate_on(tmp_path):
    """Adding a document may take it away, for training, but none of training comes to it."""
    texts = [f"document {i} " * 10 for i in range(5)]
    keys = ("data.valid_fraction=0.0001",)
    train: set[str] = set()
    for count in range(2, 6):
        path = write_jsonl(tmp_path / f"{count}.jsonl", texts[:count])
        config = configure(f"data.path={path}", *keys)
        now = set(sources.training_texts(config))
        assert len(now) == count - 1
        assert train <= now
        assert len(data.load(config).valid) > 0
        train = now


def test_documents_that_are_all_the_same_are_one_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["the same text again"] * 5)
    with pytest.raises(ConfigError, match="leaves none to train on") as error:
        data.load(configure(f"data.path={path}"))
    one_line(error)


@pytest.mark.parametrize("valid_batches", [2, 1000])
def test_validation_is_the_same_set_on_any_number_of_ranks(jsonl, valid_batches):
    one = configure(f"data.path={jsonl}", f"train.valid_batches={valid_batches}")
    corpus = data.load(one)
    whole = len(corpus.valid) // 4 * 4
    expected = rows(corpus.valid_batches(0, 1))
    assert len(expected) == min(4 * valid_batches, whole) == len(set(expected))
    assert rows(corpus.valid_batches(0, 1)) == expected
    shared = rows(corpus.valid_batches(0, 2)) + rows(corpus.valid_batches(1, 2))
    assert Counter(shared) == Counter(expected)


def test_too_few_validation_sequences_are_repeated_to_fill_a_batch(jsonl):
    corpus = data.load(configure(f"data.path={jsonl}", "train.global_batch=1000"))
    seen = rows(corpus.valid_batches(0, 1))
    assert len(seen) == 1000
    assert len(set(seen)) == len(corpus.valid) < 1000
    times = Counter(seen).values()
    assert max(times) - min(times) <= 1


def test_one_long_document_holds_its_last_sequences_out(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i} " for i in range(1000)))
    corpus = data.load(configure(f"data.path={path}"))
    tokens = np.concatenate([corpus.train[:]["tokens"], corpus.valid[:]["tokens"]]).reshape(-1)
    assert corpus.tokenizer.decode(tokens) == path.read_text()[: len(tokens)]
    assert len(corpus.valid) == pytest.approx(0.2 * len(tokens) / 17, abs=1)


# Sources


def test_default_is_the_standard_library_without_its_tests():
    config = configure()
    data.check(config)
    found = files.find_files(None)
    names = {Path(file).name for file in found.files}
    assert found.kind == "text"
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not [
        file for file in found.files if {"test", "tests", "site-packages"} & set(Path(file).parts)
    ]
    assert list(found.files) == sorted(found.files)


def test_the_second_load_finds_the_packed_tokens(jsonl, monkeypatch):
    config = configure(f"data.path={jsonl}")
    first = data.load(config)

    def never(*args):
        raise AssertionError("packed again")

    monkeypatch.setattr(ByteTokenizer, "encode", never)
    second = data.load(config)
    assert second.train[:]["tokens"].tolist() == first.train[:]["tokens"].tolist()
    with pytest.raises(AssertionError, match="packed again"):  # so the test can fail
        data.load(configure(f"data.path={jsonl}", "data.valid_fraction=0.3"))


# Streams


def open_stream(tmp_path: Path, texts: list[str], files: int) -> datasets.IterableDataset:
    shares = [share.tolist() for share in np.array_split(texts, files)]
    names = [
        str(write_jsonl(tmp_path / f"shard{i}.jsonl", share)) for i, share in enumerate(shares)
    ]
    return datasets.load_dataset("json", data_files=names, split="train", streaming=True)


def configure_stream(*overrides: str) -> Config:
    return configure(
        "data.name=some/name", "data.valid_documents=7", "data.shuffle_buffer=20", *overrides
    )


def stream_corpus(monkeypatch, stream, *overrides: str) -> data.Corpus:
    monkeypatch.setattr(sources, "_open_hub", lambda config: stream)
    return data.load(configure_stream(*overrides))


def epoch_text(corpus: data.Corpus, rank: int, world_size: int) -> str:
    """What one rank reads in an epoch."""
    assert isinstance(corpus.train, datasets.IterableDataset)
    stream = data.Stream(corpus.config, corpus.tokenizer, corpus.train, rank, world_size, 0)
    return "".join(corpus.tokenizer.decode(row) for row in stream.epoch(0))


@pytest.mark.parametrize(("files", "world_size"), [(4, 2), (4, 4), (1, 2), (3, 2), (8, 1)])
def test_ranks_share_a_stream_without_its_validation_documents(
    tmp_path, texts, monkeypatch, files, world_size
):
    # Documents as long as a sequence, so that a sequence is a document and can be recognised.
    texts = [f"document no {i:03}|" for i in range(60)]
    assert {len(text) for text in texts} == {16}
    assert len(held_out(texts)) > 7
    stream = open_stream(tmp_path, texts, files)
    corpus = stream_corpus(monkeypatch, stream)
    share = [epoch_text(corpus, rank, world_size) for rank in range(world_size)]
    seen = [{text for text in texts if text in part} for part in share]
    for a in range(world_size):
        for b in range(a):
            assert not seen[a] & seen[b]
    everything = set().union(*seen)
    valid = held_out(texts)
    assert everything == set(texts) - set(valid)
    assert decoded(corpus.valid) == joined([text[:16] for text in valid[:7]])


def test_a_stream_is_repeatable_goes_on_for_ever_and_starts_anywhere(tmp_path, texts, monkeypatch):
    stream = open_stream(tmp_path, texts, 4)
    corpus = stream_corpus(monkeypatch, stream)
    everything = rows(islice(corpus.train_batches(1, 2), 300))
    assert len(everything) == 600
    assert max(Counter(everything).values()) > 1  # several epochs
    assert rows(islice(corpus.train_batches(1, 2, start_step=17), 283)) == everything[34:]
    with_worker = stream_corpus(monkeypatch, stream, "data.workers=2")
    assert rows(islice(with_worker.train_batches(1, 2), 300)) == everything
    other_seed = stream_corpus(monkeypatch, stream, "train.seed=5")
    assert rows(islice(other_seed.train_batches(1, 2), 300)) != everything


def test_stream_epochs_differ_in_order(tmp_path, monkeypatch):
    stream = open_stream(tmp_path, [f"document no {i:03}|" for i in range(40)], 1)
    corpus = stream_corpus(monkeypatch, stream, "train.micro_batch=1", "train.global_batch=1")
    n = 40 - len(held_out([f"document no {i:03}|" for i in range(40)]))
    seen = rows(islice(corpus.train_batches(0, 1), 2 * n))
    assert Counter(seen[:n]) == Counter(seen[n:])
    assert seen[:n] != seen[n:]


# The start of a run


def test_the_start_says_what_is_read(jsonl):
    line = data.load(configure(f"data.path={jsonl}")).describe()
    assert line.startswith(f"{jsonl}: 1 json file(s), 40 document(s); ")
    assert re.search(r"; \d+ training and \d+ validation sequences; tokenizer bytes, 257 t", line)


def test_the_start_of_a_stream_says_what_is_read(tmp_path, texts, monkeypatch):
    stream = open_stream(tmp_path, texts, 1)
    line = stream_corpus(monkeypatch, stream, "data.subset=part").describe()
    assert line.startswith("some/name, streamed: subset part, split train; ")
    assert re.search(r"; \d+ validation sequences; tokenizer bytes, 257 tokens", line)


def test_the_line_is_printed(tmp_path):
    keys = argv(tmp_path, "a", "train.steps=1", "parallel.expert_parallel=1")
    with Training(1, keys, tmp_path / "log") as training:
        assert training.exit_codes() == [0]
    assert re.search(r"data +models: \d+ text file\(s\), \d+ document", training.log.read_text())


# Bad input


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", ["data.path=", "holds no documents"]),
        ("short.txt", "hi", ["data.path=", "model.seq_len=16", "add text"]),
        ("empty.jsonl", "", ["data.path="]),
        (
            "bad.jsonl",
            '{"text": "a"}\n{"text": ',
            ["data.path=", "cannot be read as json", "bad.jsonl, line 2"],
        ),
        ("column.jsonl", '{"body": "a"}\n', ["data.text_column=text", "body"]),
        (
            "number.jsonl",
            '{"text": 1}\n{"text": 2}\n',
            ["data.text_column=text holds int in", "number.jsonl, line 1"],
        ),
        ("two.jsonl", '{"text": "a"}\n{"text": "b"}\n', ["1 training", "model.seq_len=16"]),
        ("bad.parquet", "no parquet", ["data.path=", "cannot be read as parquet", "bad.parquet:"]),
    ],
)
def test_bad_file_is_one_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    config = configure(f"data.path={path}")
    data.check(config)
    with pytest.raises(ConfigError) as error:
        data.load(config)
    for word in words:
        assert word in one_line(error)


def test_short_validation_documents_are_one_line(tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, "tiny"])
    config = configure(f"data.path={path}", "model.seq_len=500", "data.valid_fraction=0.01")
    with pytest.raises(ConfigError) as error:
        data.load(config)
    assert "raise data.valid_fraction=0.01" in one_line(error)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothing.txt", "no such file"),
        ("*.nothing", "no such file"),
        ("pipe", "neither a file nor a folder"),
        ("broken", "a link to nothing"),
        ("pictures", "no .txt"),
        ("mixed", "mixes json and text files"),
    ],
)
def test_check_finds_a_bad_path_before_loading(tmp_path, path, words):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("x")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "broken").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "mixed" / "a.py").write_text("x")
    (tmp_path / "mixed" / "a.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        data.check(configure(f"data.path={tmp_path / path}"))
    assert f"data.path={tmp_path / path}" in one_line(error)
    assert words in one_line(error)


def test_check_finds_a_vocabulary_larger_than_the_model():
    with pytest.raises(ConfigError) as error:
        data.check(configure("model.vocab_size=256"))
    for word in ("model.vocab_size=256", "data.tokenizer=bytes", "model.vocab_size=257 or more"):
        assert word in one_line(error)


@pytest.mark.parametrize(
    ("number", "overrides", "words"),
    [
        (40, ["data.text_column=body"], "data.text_column=body is not in data.name=some/name"),
        (40, ["data.text_column=other"], "holds int, not text"),
        (1, [], "leaves none to train on"),
        (0, [], "holds no documents"),
        (40, ["model.seq_len=5000"], "model.seq_len=5000"),
    ],
)
def test_bad_stream_is_one_line(tmp_path, texts, monkeypatch, number, overrides, words):
    stream = open_stream(tmp_path, texts, 1)
    with pytest.raises(ConfigError) as error:
        stream_corpus(monkeypatch, stream.take(number), *overrides)
    assert words in one_line(error)


def test_a_rank_without_a_sequence_says_so(tmp_path, texts, monkeypatch):
    # The second file's documents are too short for a sequence, so the rank that gets it has none.
    stream = open_stream(tmp_path, [*texts, *["short"] * 2], 2)
    short = [json.loads(line) for line in (tmp_path / "shard1.jsonl").read_text().splitlines()][:2]
    write_jsonl(tmp_path / "shard1.jsonl", [row["text"][:5] for row in short])
    corpus = stream_corpus(monkeypatch, stream)
    with pytest.raises(ConfigError, match=r"start fewer ranks or lower model\.seq_len"):
        print([next(corpus.train_batches(rank, 2)) for rank in range(2)])
