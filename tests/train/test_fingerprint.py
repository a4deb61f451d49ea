"""A run's data is recognized at any path, and changes are reported."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from scripts.train_tokenizer import train_bpe
from tests.train.test_data import configure, own_cache, write_jsonl  # noqa: F401
from train.data import batches as data
from train.data.fingerprint import differences

TEXTS = [f"document {i}: " + f"word{i} é " * (5 + i % 7) for i in range(40)]


def fingerprint(*overrides: str) -> dict:
    return data.load(configure(*overrides)).fingerprint()


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS[:20])
    write_jsonl(folder / "b.jsonl", TEXTS[20:])
    return folder


@pytest.mark.parametrize("key", ["data.path", "data.name"])
def test_the_same_data_at_another_path_is_the_same(folder, tmp_path, key):
    before = fingerprint(f"{key}={folder}")
    shutil.copytree(folder, tmp_path / "moved")
    after = fingerprint(f"{key}={tmp_path / 'moved'}")
    assert before == after
    assert differences(before, after) == []
    assert json.loads(json.dumps(before)) == before


def test_the_same_documents_in_other_files_are_the_same(folder, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", TEXTS)
    assert differences(fingerprint(f"data.path={folder}"), fingerprint(f"data.path={one}")) == []


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([*TEXTS, "one more document"], ["documents: 40 there, 41 now", "the text of the doc"]),
        (TEXTS[::-1], ["the text of the documents changed"]),
        ([*TEXTS[:-1], TEXTS[-1].replace("word", "Word")], ["the text of the documents changed"]),
    ],
)
def test_other_data_under_the_same_name_is_said(folder, texts, says):
    before = fingerprint(f"data.path={folder}")
    write_jsonl(folder / "a.jsonl", texts[:20])
    write_jsonl(folder / "b.jsonl", texts[20:])
    lines = differences(before, fingerprint(f"data.path={folder}"))
    for one in says:
        assert any(one in line for line in lines)


@pytest.mark.parametrize("key", ["data.path", "data.name"])
def test_another_tokenizer_under_the_same_name_is_said(folder, tmp_path, key):
    path = tmp_path / "tokenizer.json"
    tokenizer = train_bpe(iter(TEXTS), 300)
    tokenizer.save(str(path))
    keys = (f"{key}={folder}", f"data.tokenizer={path}")
    before = fingerprint(*keys)
    text = json.dumps(json.loads(path.read_text()), indent=7)  # the same, laid out otherwise
    path.write_text(text)
    assert differences(before, fingerprint(*keys)) == []
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    assert "the tokenizer or its end-of-document token changed" in differences(
        before, fingerprint(*keys)
    )


def test_another_end_of_document_is_said(folder, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = train_bpe(iter(TEXTS), 300)
    tokenizer.add_special_tokens(["<|other|>"])
    tokenizer.save(str(path))
    keys = (f"data.path={folder}", f"data.tokenizer={path}", "model.vocab_size=512")
    before = fingerprint(*keys)
    assert len(differences(before, fingerprint(*keys, "data.eod_token=<|other|>"))) == 1


def test_a_stream_with_another_file_is_said(folder):
    before = fingerprint(f"data.name={folder}", "data.valid_documents=3")
    write_jsonl(folder / "c.jsonl", TEXTS)
    lines = differences(before, fingerprint(f"data.name={folder}", "data.valid_documents=3"))
    assert "number of files: 2 there, 3 now" in lines
    assert "the files of the stream changed" in lines


def test_streamed_and_local_data_differ(folder):
    one, other = fingerprint(f"data.path={folder}"), fingerprint(f"data.name={folder}")
    assert "documents: 40 there, none now" in differences(one, other)
