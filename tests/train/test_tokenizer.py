"""Tokenizers: text survives the round trip, and the script trains one that loads."""

import json
import pickle
from pathlib import Path

import datasets
import pytest
import tokenizers
from datasets.fingerprint import Hasher

from scripts import train_tokenizer
from train.config import ConfigError, load
from train.data import batches as data
from train.data.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer

CONFIG = str(Path(__file__).parents[2] / "configs" / "demo_cpu.yaml")
TEXTS = ["def f(x):\n\treturn x  # naïve 日本語 🙂\r\n", "", " two  spaces ", "x <|endoftext|> y"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A file that the script trained, the overrides that name its text, and its documents."""
    folder = tmp_path_factory.mktemp("trained")
    documents = [f"def function_{i}(argument):\n    return {i} + argument\n" for i in range(60)]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents)
    )
    out = folder / "new" / "tokenizer.json"
    overrides = [f"data.path={folder / 'corpus.jsonl'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        train_tokenizer.main([CONFIG, "--vocab-size", "320", "--out", str(out), *overrides])
        yield out, overrides, documents


def test_bytes_round_trip():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode([*ids, tokenizer.eod]) == text


def test_script_trains_what_load_reads(trained):
    out, _, documents = trained
    tokenizer = load_tokenizer(str(out))
    assert tokenizer.vocab_size == 320
    encoded = tokenizer.encode([*TEXTS, *documents])
    for text, ids in zip([*TEXTS, *documents], encoded, strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids  # not even where the text spells it out
    tokens, size = sum(map(len, encoded[-60:])), sum(len(text) for text in documents)
    assert tokens < size / 2


def test_script_learns_from_training_documents_alone(trained, monkeypatch):
    _, overrides, documents = trained
    seen: list[str] = []

    def stop(texts, vocab_size):
        seen.extend(texts)
        raise ConfigError("seen enough")

    monkeypatch.setattr(train_tokenizer, "train_bpe", stop)
    assert train_tokenizer.main([CONFIG, *overrides]) == 2
    _, valid = data.load_documents(load(CONFIG, overrides))
    assert sorted([*seen, *valid["text"]]) == sorted(documents)
    assert len(valid) > 0


def test_script_says_how_to_use_it(trained, capsys, tmp_path):
    _, overrides, _ = trained
    out = tmp_path / "t.json"
    train_tokenizer.main([CONFIG, *overrides, "--vocab-size", "300", "--out", str(out)])
    assert f"data.tokenizer={out} model.vocab_size=320" in capsys.readouterr().out


def test_trained_tokenizer_feeds_batches(trained):
    out, overrides, _ = trained
    config = load(
        CONFIG,
        [*overrides, f"data.tokenizer={out}", "model.seq_len=16", "data.valid_fraction=0.2"],
    )
    data.check(config)
    batch = next(data.load(config).train_batches(0, 1))
    assert batch.tokens.max() < 320
    assert (batch.tokens == load_tokenizer(str(out)).eod).any()


def test_hash_is_stable_after_use_and_after_pickling(trained):
    """`datasets` finds packed tokens by it."""
    for tokenizer in (ByteTokenizer(), load_tokenizer(str(trained[0]))):
        before = Hasher.hash(tokenizer)
        tokenizer.encode(TEXTS * 20)
        assert Hasher.hash(tokenizer) == before
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert Hasher.hash(copy) == before
        assert [a.tolist() for a in copy.encode(TEXTS)] == [
            a.tolist() for a in tokenizer.encode(TEXTS)
        ]
    assert Hasher.hash(ByteTokenizer()) != Hasher.hash(load_tokenizer(str(trained[0])))


def test_truncation_padding_and_added_tokens_of_a_file_are_ignored(trained):
    inner = tokenizers.Tokenizer.from_file(str(trained[0]))
    inner.enable_truncation(3)
    inner.enable_padding(length=8)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = FileTokenizer(inner.to_str())
    assert tokenizer.decode(tokenizer.encode(["a long enough text"])[0]) == "a long enough text"
    assert tokenizer.eod not in tokenizer.encode(["text"])[0]


def test_bad_tokenizers_are_one_line(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "noend.json"))
    cases = {
        "missing.json": "no such file",
        "bad.json": "not a file of the tokenizers library",
        "noend.json": "no end-of-document token",
    }
    for name, words in cases.items():
        with pytest.raises(ConfigError) as error:
            load_tokenizer(str(tmp_path / name))
        assert f"data.tokenizer={tmp_path / name}" in str(error.value)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_script_refuses_bad_arguments(capsys):
    for arguments in (["--vocab-size", "100"], ["--out", "tokenizer.bin"]):
        with pytest.raises(SystemExit):
            train_tokenizer.main([CONFIG, *arguments])
        assert arguments[1] in capsys.readouterr().err
    assert train_tokenizer.main([CONFIG, "data.path=/nowhere.txt"]) == 2
    assert capsys.readouterr().err.startswith("error: data.path=/nowhere.txt: no such file")
