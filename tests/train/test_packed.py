"""The cache of packed data: made once, found again, whole or not there; and what it takes."""

import json
import multiprocessing
import os
import stat
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from filelock import FileLock

from scripts.train_tokenizer import train_bpe
from tests.train.test_data import configure, one_line, own_cache, write_jsonl  # noqa: F401
from train.checkpoint import progress
from train.config import Config, ConfigError
from train.data import batches as data
from train.data import packed, sources, tokens, units
from train.data.tokenizer import ByteTokenizer

FILES = ("train-00000-000.arrow", "valid-00000-000.arrow", "prepared.json", "checksums.sha256")
TEXTS = [f"document {i}: " + f"word{i} é " * (5 + i % 7) for i in range(40)]


def cached() -> list[Path]:
    return sorted((Path(datasets.config.HF_DATASETS_CACHE) / "packed").glob("*"))


def whole() -> list[Path]:
    return [path for path in cached() if path.is_dir()]


def test_of_ranks_that_load_at_once_one_packs(tmp_path, monkeypatch):
    """The others wait for it, and read the same."""
    config = configure(f"data.path={write_jsonl(tmp_path / 'a.jsonl', TEXTS)}")
    encode = ByteTokenizer.encode

    def counted(self, texts):
        time.sleep(0.5)  # or the others come when it is done
        with (tmp_path / "packed_by").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return encode(self, texts)

    def load(queue) -> None:
        try:
            queue.put(data.load(config).fingerprint())
        except ConfigError as error:
            queue.put({"error": str(error)})

    monkeypatch.setattr(ByteTokenizer, "encode", counted)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=load, args=(queue,)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    assert found[0]["documents"] == 40
    assert all(one == found[0] for one in found)
    assert len(set((tmp_path / "packed_by").read_text().split())) == 1


def test_a_process_that_was_killed_while_it_packed_leaves_nothing_in_the_way(tmp_path):
    config = configure(f"data.path={write_jsonl(tmp_path / 'a.jsonl', TEXTS)}")
    before = data.load(config).fingerprint()
    (folder,) = whole()
    folder.rename(folder.with_name(f"{folder.name}.unfinished"))
    (folder.with_name(f"{folder.name}.unfinished") / "prepared.json").unlink()
    assert data.load(config).fingerprint() == before
    assert whole() == [folder]


@pytest.mark.parametrize("what", ["text", "tokenizer", "valid_fraction", "text_column"])
def test_other_data_is_packed_again(tmp_path, what):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    keys = {
        "valid_fraction": "data.valid_fraction=0.3",
        "text_column": "data.text_column=other",
    }
    first = data.load(configure(f"data.path={path}"))
    if what == "text":  # of the same size
        path.write_text(path.read_text().replace("document 7", "Document 7"))
    if what == "text_column":
        rows = [{"text": text, "other": text[::-1]} for text in TEXTS]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        first = data.load(configure(f"data.path={path}"))
    if what == "tokenizer":
        train_bpe(iter(TEXTS), 300).save(str(tmp_path / "t.json"))
        keys["tokenizer"] = f"data.tokenizer={tmp_path / 't.json'}"
    second = data.load(configure(f"data.path={path}", *filter(None, [keys.get(what)])))
    assert first.train[:]["tokens"].tolist() != second.train[:]["tokens"].tolist()


def cut(path: Path) -> None:
    """At the end of what was written first: Arrow takes it for a shorter file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    """Tokens are tokens still."""
    found = bytearray(path.read_bytes())
    found[len(found) // 2] ^= 1
    path.write_bytes(found)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, alter, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_cache_is_named_and_packed_again(tmp_path, caplog, harm, name):
    config = configure(f"data.path={write_jsonl(tmp_path / 'a.jsonl', TEXTS)}")

    def load():
        corpus = data.load(config)  # which is mapped: nobody may hold it while files change
        sides = (corpus.train, corpus.valid)
        return [side[:]["tokens"].tolist() for side in sides], corpus.fingerprint()

    want = load()
    (folder,) = whole()
    harm(folder / name)
    got = load()
    (warning,) = caplog.messages
    assert f"packed data in {folder} is damaged ({name}" in warning or (
        # The list itself, altered or cut, does not tell which.
        name == "checksums.sha256" and f"packed data in {folder} is damaged (" in warning
    )
    assert warning.endswith("; it is packed again")
    assert got == want
    load()
    assert len(caplog.messages) == 1


def test_of_processes_that_find_damage_one_packs(tmp_path, monkeypatch):
    config = configure(f"data.path={write_jsonl(tmp_path / 'a.jsonl', TEXTS)}")
    want = data.load(config).fingerprint()
    (folder,) = whole()
    alter(folder / FILES[0])
    make = packed._make

    def counted(*args) -> None:
        with (tmp_path / "made_by").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        make(*args)

    def load(queue) -> None:
        queue.put(data.load(config).fingerprint())

    monkeypatch.setattr(packed, "_make", counted)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=load, args=(queue,)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get() for _ in processes] == [want] * 4
    for process in processes:
        process.join()
    assert len((tmp_path / "made_by").read_text().split()) == 1


def test_a_damaged_cache_that_cannot_be_removed_is_one_line(tmp_path, monkeypatch):
    config = configure(f"data.path={write_jsonl(tmp_path / 'a.jsonl', TEXTS)}")
    data.load(config)
    (folder,) = whole()
    cut(folder / FILES[0])

    def refused(path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packed.shutil, "rmtree", refused)
    with pytest.raises(ConfigError, match="is damaged and cannot be removed") as error:
        data.load(config)
    assert f"packed data in {folder} " in one_line(error)
    assert "remove that folder, and it is packed again" in one_line(error)


def test_every_byte_of_the_cache_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    fsync, rename, synced, there = os.fsync, Path.rename, {}, {}

    def note(number: int) -> None:
        fsync(number)
        synced[os.fstat(number).st_ino] = os.fstat(number).st_size

    def renamed(self: Path, target: Path) -> Path:
        there.update({path.name: path.stat() for path in self.iterdir()})
        assert self.stat().st_ino in synced
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", renamed)
    data.load(configure(f"data.path={write_jsonl(tmp_path / 'a.jsonl', TEXTS)}"))
    assert set(there) == set(FILES)
    assert all(synced.get(stat.st_ino) == stat.st_size for stat in there.values())


def test_a_process_that_waits_for_the_one_that_packs_says_so(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(progress, "AFTER_S", 0.2)
    data.load(configure(f"data.path={path}"))
    (folder,) = whole()
    context = multiprocessing.get_context("fork")
    holds = context.Event()

    def hold() -> None:
        with FileLock(f"{folder}.lock"):
            holds.set()
            time.sleep(1)

    process = context.Process(target=hold)
    process.start()
    holds.wait()
    with packed._only_one(folder):
        pass
    process.join()
    said = f"waiting for another process, which packs the data and holds {folder}.lock: 0 s so far"
    assert capsys.readouterr().err.splitlines() == [said]


def test_a_cache_that_cannot_be_written_names_hf_home(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(
        ConfigError, match="set HF_HOME to a folder that can be written and has room"
    ) as error:
        data.load(configure(f"data.path={write_jsonl(tmp_path / 'a.jsonl', TEXTS)}"))
    assert str(tmp_path / "file" / "cache") in one_line(error)


def test_a_full_disk_names_hf_home_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(tokens.TokenFile, "_flush", full)
        with pytest.raises(ConfigError, match="No space left on device") as error:
            data.load(configure(f"data.path={path}"))
    assert "HF_HOME" in one_line(error)
    assert not whole()
    data.load(configure(f"data.path={path}"))


def test_a_cache_of_somebody_else_is_read(tmp_path):
    """Shared, and read-only for the training process."""
    config = configure(f"data.path={write_jsonl(tmp_path / 'a.jsonl', TEXTS)}")
    data.load(config)
    for path in cached():
        if path.name.endswith(".lock"):
            path.unlink()
    folder = whole()[0].parent
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        data.load(config)
        assert not [path for path in cached() if path.name.endswith(".lock")]
    finally:
        folder.chmod(stat.S_IRWXU)


def test_files_that_change_while_they_are_read_are_one_line(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    survey = units.survey

    then = [TEXTS]

    def and_then(*args):
        found = survey(*args)
        write_jsonl(path, then[0])
        return found

    monkeypatch.setattr(units, "survey", and_then)
    for then[0] in (TEXTS[:-1], [*TEXTS, "one more"]):
        write_jsonl(path, TEXTS)
        with pytest.raises(ConfigError, match="changed while they were read"):
            data.load(configure(f"data.path={path}"))


@pytest.mark.parametrize("together", [1, 30, 10_000])
def test_how_much_is_written_at_once_changes_nothing(tmp_path, monkeypatch, together):
    monkeypatch.setattr(tokens, "TOGETHER", together)
    corpus = data.load(configure(f"data.path={write_jsonl(tmp_path / 'a.jsonl', TEXTS)}"))
    found = corpus.train[:]["tokens"].reshape(-1)
    expected = [*ByteTokenizer().encode(list(sources.training_texts(corpus.config)))]
    joined = np.concatenate([np.append(ids, ByteTokenizer.eod) for ids in expected])
    assert len(joined) - 17 < len(found) <= len(joined)
    assert found.tolist() == joined[: len(found)].tolist()


def peak_memory(config: Config) -> int:
    """Bytes that loading adds to a process of its own at most."""

    def load(queue) -> None:
        # `ru_maxrss` would be the parent's, which the child begins with.
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
        data.load(config)
        queue.put(high_water() - before)

    def high_water() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=load, args=(queue,))
    process.start()
    peak = queue.get()
    process.join()
    return peak


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="measures by Linux's /proc"
)
@pytest.mark.parametrize("form", ["lines", "one line", "record"])
def test_memory_does_not_grow_with_a_text(tmp_path, form):
    """About 100 bytes of it for each byte of text, in one piece."""
    end = " " if form == "one line" else "\n"
    text = "".join(f"line {i} of a text with words {i * i}{end}" for i in range(120_000))
    train_bpe(iter([text[:100_000]]), 1000).save(str(tmp_path / "t.json"))
    path = tmp_path / "a.txt"
    path.write_text(text)
    if form == "record":
        path = write_jsonl(tmp_path / "a.jsonl", [text, *(f"{i} " * 300 for i in range(5))])
    config = configure(
        f"data.path={path}",
        f"data.tokenizer={tmp_path / 't.json'}",
        "model.vocab_size=1024",
        "model.seq_len=256" if form == "record" else "model.seq_len=1024",
    )
    assert peak_memory(config) < 200e6
    assert len(text) * 100 > 450e6  # which one piece would take


def test_a_stream_names_hf_home_where_its_cache_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "huggingface"
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "datasets"))
    write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def refused(*args, **kwargs):
        home.mkdir(parents=True)

    monkeypatch.setattr(datasets, "load_dataset_builder", refused)
    with pytest.raises(ConfigError, match=r"Not a directory.*; set HF_HOME") as error:
        data.load(configure(f"data.name={tmp_path}"))
    one_line(error)
