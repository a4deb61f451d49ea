"""Tokenizers: text survives the round trip, and the script trains one that loads."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import tokenizers
from datasets.fingerprint import Hasher

from scripts import train_tokenizer
from train.config import ConfigError, load
from train.data import batches as data
from train.data import split
from train.data import tokenizer as tokenizer_module
from train.data.pieces import cut
from train.data.readers import read_documents
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
    places = [split.place(split.digest([text])) for text in documents]
    limit = split.limit(0.02, places)
    assert seen == [text for text, place in zip(documents, places, strict=True) if place >= limit]
    assert 0 < len(seen) < len(documents)


def test_script_says_how_to_use_it(trained, capsys, tmp_path):
    _, overrides, documents = trained
    out = tmp_path / "a t.json"
    train_tokenizer.main([CONFIG, *overrides, "--vocab-size", "300", "--out", str(out)])
    said = capsys.readouterr().out
    assert f"'data.tokenizer={out}' model.vocab_size=320" in said, "not as a shell takes it"
    places = [split.place(split.digest([text])) for text in documents]
    limit = split.limit(0.02, places)
    training = [text for text, place in zip(documents, places, strict=True) if place >= limit]
    sample = "".join(training[:20])
    ratio = len(sample) / len(load_tokenizer(str(out)).encode([sample])[0])
    assert f"300 tokens, {ratio:.2f} bytes of this text per token" in said


def test_script_reads_the_text_once(trained, tmp_path, monkeypatch):
    """Twice: to see what is held out, and to learn from the rest."""
    _, overrides, _ = trained
    read: list[str] = []
    whole = read_documents

    def counted(kind, path, column):
        read.append(path)
        return whole(kind, path, column)

    monkeypatch.setattr("train.data.survey.read_documents", counted)
    out = tmp_path / "t.json"
    assert train_tokenizer.main([CONFIG, *overrides, "--out", str(out)]) == 0
    assert len(read) == 2


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


def test_bytes_of_text_are_counted(trained):
    """Whole documents exactly, whatever their tokens; ends of documents are not text."""
    text = "for i in range(3): dürfen 世界 🙂\n"
    for tokenizer in (ByteTokenizer(), load_tokenizer(str(trained[0]))):
        (ids,) = tokenizer.encode([text])
        size = len(text.encode())
        assert tokenizer.count_bytes([*ids, tokenizer.eod]) == size
        assert tokenizer.count_bytes([*ids, tokenizer.eod, *ids]) == 2 * size
        assert tokenizer.count_bytes([]) == tokenizer.count_bytes([tokenizer.eod]) == 0


def test_truncation_padding_and_added_tokens_of_a_file_are_ignored(trained):
    inner = tokenizers.Tokenizer.from_file(str(trained[0]))
    inner.enable_truncation(3)
    inner.enable_padding(length=8)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = FileTokenizer(inner.to_str(), "<|endoftext|>")
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


@pytest.fixture
def folder(tmp_path, trained) -> Path:
    """As the transformers library saves a tokenizer, with an end of another name."""
    inner = tokenizers.Tokenizer.from_file(str(trained[0]))
    inner.add_special_tokens(["<|start|>", "<|stop|>"])
    folder = tmp_path / "tok"
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("token", ["<|stop|>", {"content": "<|stop|>", "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_folder_says_itself_how_documents_end(folder, name, token):
    (folder / name).write_text(json.dumps({"eos_token": token}))
    for path in (folder, f"{folder}/", folder / "tokenizer.json"):
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.decode([tokenizer.eod]) == ""
        assert isinstance(tokenizer, FileTokenizer)
        assert tokenizer.eod == tokenizer.vocab_size - 1


@pytest.mark.parametrize("content", ["", "[]", '{"eos_token": null}', '{"eos_token": "<gone>"}'])
def test_settings_that_do_not_say_it_leave_the_usual_names(folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    assert load_tokenizer(str(folder)).eod == 0


def test_a_folder_is_never_sent_to_the_hub(folder, tmp_path, monkeypatch):
    def never(name):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(tokenizer_module, "_from_hub", never)
    monkeypatch.chdir(tmp_path)
    for name in ("tok", "tok/", "./tok", str(folder)):
        load_tokenizer(name)
    (tmp_path / "empty").mkdir()
    for name in (
        "empty",
        "empty/",
        "./none",
        "none/",
        "none.JSON",
        "/none/none",
        "a/b/c",
        "~/none",
    ):
        with pytest.raises(ConfigError, match=r"no such file|has no tokenizer\.json") as error:
            load_tokenizer(name)
        assert f"data.tokenizer={name}: " in str(error.value)
    with pytest.raises(AssertionError, match="asked the hub"):
        load_tokenizer("user/name")


def test_a_tokenizer_of_the_hub(folder, monkeypatch):
    """With its settings; one that is not there is one line that says where it was looked for."""
    import huggingface_hub

    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')

    def download(name, file):
        if name != "user/name" or not (folder / file).is_file():
            raise OSError(f"no {file}\nat all")
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tokenizer = load_tokenizer("user/name")
    assert tokenizer.eod == tokenizer.vocab_size - 1
    with pytest.raises(
        ConfigError, match="no such file or folder here, and not available"
    ) as error:
        load_tokenizer("user/other")
    assert "\n" not in str(error.value)


def test_a_key_names_the_end_of_a_document(folder):
    tokenizer = load_tokenizer(str(folder), "<|start|>")
    assert tokenizer.eod == tokenizer.vocab_size - 2
    config = load(CONFIG, [f"data.tokenizer={folder}", "data.eod_token=<|start|>"])
    assert config.data.eod_token == "<|start|>"
    for token, says in (("<|stpo|>", "did you mean <|stop|>?"), ("#####", "its special tokens: ")):
        with pytest.raises(ConfigError, match=f"data.eod_token={re.escape(token)}") as error:
            load_tokenizer(str(folder), token)
        assert says in str(error.value)
    with pytest.raises(ConfigError, match="leave it out"):
        load_tokenizer("bytes", "<|stop|>")


def test_without_a_usual_name_the_key_is_named(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    inner.save(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match=r"set data\.eod_token to one of its tokens") as error:
        load_tokenizer(str(tmp_path / "t.json"))
    assert "<|im_start|>, <|im_end|>" in str(error.value)
    assert load_tokenizer(str(tmp_path / "t.json"), "<|im_end|>").eod == 1


@pytest.mark.parametrize(
    "model",
    [
        tokenizers.models.WordLevel({"a": 0, "</s>": 1}),
        tokenizers.models.WordPiece({"a": 0, "</s>": 1}),
        tokenizers.models.Unigram([("a", 0.0), ("</s>", 0.0)]),
    ],
)
def test_a_tokenizer_that_fails_at_encoding_is_one_line(tmp_path, model):
    tokenizers.Tokenizer(model).save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert [ids.tolist() for ids in tokenizer.encode(["a", "a"])] == [[0], [0]]
    with pytest.raises(ConfigError, match="cannot encode the text that begins 'known to") as error:
        tokenizer.encode(["a", "known to nobody\nat all", "a"])
    assert "data.tokenizer" in str(error.value)
    assert "\n" not in str(error.value)


def test_long_texts_are_encoded_in_pieces(trained, monkeypatch):
    """They give the same tokens as in one piece, but where a line is longer than a piece."""
    tokenizer = load_tokenizer(str(trained[0]))
    texts = ["\n\n  \n".join(trained[2]), "", trained[2][0], "x" * 1000]
    whole = tokenizer.encode(texts)
    monkeypatch.setattr(tokenizer_module, "TOGETHER", 300)
    monkeypatch.setattr(cut, "__defaults__", (100,))
    pieces = tokenizer.encode(texts)
    assert [ids.tolist() for ids in pieces[:3]] == [ids.tolist() for ids in whole[:3]]
    assert tokenizer.decode(pieces[3]) == texts[3]


def test_where_texts_are_cut():
    assert list(cut("ab\nc d\n\n e", 8)) == ["ab\nc d", "\n\n e"]
    assert list(cut("a\nbc\nd", 3)) == ["a", "\nbc", "\nd"]
    assert list(cut("abcdefg", 3)) == ["abc", "def", "g"]
    assert list(cut("\n\n\n\n", 3)) == ["\n\n\n", "\n"]
    assert list(cut("", 3)) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--vocab-size", "100"], "--vocab-size=100 is not in 257 to"),
        (["--vocab-size", "9999999999999"], "--vocab-size=9999999999999"),
        (["--documents", "0"], "--documents=0"),
        (["--documents", "-3"], "--documents=-3"),
        (["--out", "tokenizer.bin"], "--out tokenizer.bin must end in .json"),
        (["--out", "{tmp}/folder.json"], "folder.json is a folder"),
        (["--out", "{tmp}/file/t.json"], "t.json cannot be written: "),
        (["--out", "x" * 300 + ".json"], "cannot be written: File name too long"),
        (["--out", "/proc/t.json"], "--out /proc/t.json cannot be written: "),
        (["data.path=/nowhere.txt"], "data.path=/nowhere.txt: no such file"),
        (["data.path={tmp}/broken.jsonl"], "broken.jsonl, line 1: "),
        (["data.path={tmp}/file"], "holds no documents"),
    ],
)
def test_script_refuses_bad_arguments_in_one_line(tmp_path, capsys, arguments, says):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "cut off')
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "t.json")]
    assert train_tokenizer.main([CONFIG, *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert len([*tmp_path.iterdir()]) == 3, "something is left"


def test_script_that_finds_the_disk_full_keeps_the_file_before(
    trained, tmp_path, monkeypatch, capsys
):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    out = tmp_path / "t.json"
    out.write_text("before")
    monkeypatch.setattr(Path, "write_text", full)
    assert (
        train_tokenizer.main([CONFIG, *trained[1], "--vocab-size", "300", "--out", str(out)]) == 2
    )
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert out.read_text() == "before"


def test_script_learns_from_a_single_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("words and more words. " * 200)
    arguments = [f"data.path={tmp_path / 'a.txt'}", "--vocab-size", "280"]
    out = tmp_path / "t.json"
    assert train_tokenizer.main([CONFIG, *arguments, "--out", str(out)]) == 0
    assert len(load_tokenizer(str(out)).encode(["words and more"])[0]) < 8


def test_script_prints_what_a_terminal_cannot_show(tmp_path):
    (tmp_path / "é.txt").write_text("words and more words. " * 200)
    command = [sys.executable, "-m", "scripts.train_tokenizer", CONFIG, "--vocab-size", "280"]
    command += [f"data.path={tmp_path / 'é.txt'}", "--out", str(tmp_path / "é.json")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"data.tokenizer=" in done.stdout
