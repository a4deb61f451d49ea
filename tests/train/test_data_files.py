"""Files as people have them: what is read, what is refused, and that the one line names it."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.train.test_data import configure, one_line, own_cache, write_jsonl  # noqa: F401
from train.config import Config, ConfigError
from train.data import batches as data
from train.data import files, opening, readers
from train.data.files import find_files
from train.data.readers import read_documents

TEXTS = [f"document {i}: " + f"word{i} é 日本 " * (5 + i % 7) for i in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def texts_of(path: Path | str, column: str = "text", split: str = "train") -> list[str]:
    """All documents of a path."""
    found = find_files(str(path), split)
    return [
        "".join(document)
        for file in found.files
        for document in read_documents(found.kind, file, column)
    ]


def error_of(path: Path | str, *overrides: str) -> str:
    """The one line that a run with this data ends with."""
    with pytest.raises(ConfigError) as error:
        start(configure(f"data.path={path}", *overrides))
    return one_line(error)


def start(config: Config) -> data.Corpus:
    data.check(config)
    return data.load(config)


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# Names and compression


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.Json", "a", "a.jsonl.1", "a.data"]
)
def test_json_lines_under_any_name_are_no_text(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    assert find_files(str(tmp_path / name)).kind == "json"
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", ["a.parquet", "a.parq", "a.PQ", "a.bin", "a"])
def test_parquet_under_any_name(tmp_path, name):
    assert texts_of(table(tmp_path / name, text=TEXTS)) == TEXTS


def zstd(content: bytes) -> bytes:
    if opening.zstd is None:
        pytest.skip("backports.zstd is not installed")
    return opening.zstd.compress(content)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".GZ": gzip.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files(tmp_path, suffix):
    """By content: a file that was unpacked and kept its name is read as well."""
    path = tmp_path / f"a.jsonl{suffix}"
    for content in (COMPRESSIONS[suffix](LINES.encode()), LINES.encode()):
        path.write_bytes(content)
        assert texts_of(path) == TEXTS
        assert texts_of(tmp_path) == TEXTS
    text = tmp_path / f"b.txt{suffix}"
    text.write_bytes(COMPRESSIONS[suffix]("\n".join(TEXTS).encode()))
    assert texts_of(text) == ["\n".join(TEXTS)]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_download_that_broke_off(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](os.urandom(4000).hex().encode())[:-400])
    assert f"cannot be read as json: {path}" in error_of(path)


def test_a_broken_compressed_file(tmp_path):
    path = tmp_path / "a.txt.gz"
    content = bytearray(gzip.compress(os.urandom(100_000).hex().encode()))
    content[5000:5100] = b"x" * 100
    path.write_bytes(content)
    assert f"cannot be read as text: {path}: " in error_of(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18 rest", "compressed with lz4, which is not supported"),
        ("a.jsonl.zip", b"PK\x03\x04 rest", "a zip archive"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c rest", "a 7z archive"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
    ],
)
def test_what_is_to_be_unpacked_first_says_so(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    line = error_of(tmp_path / name)
    assert words in line
    assert str(tmp_path / name) in line


def tar_of(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        about = tarfile.TarInfo(name)
        about.size = len(LINES.encode())
        archive.addfile(about, io.BytesIO(LINES.encode()))
    return file.getvalue()


def zip_of(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, LINES)
    return file.getvalue()


TWICE = "is compressed twice; decompress it once"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        *((name, tar_of("a.jsonl"), "is a tar archive") for name in ("a.tar", "a.txt", "a.jsonl")),
        *(
            (name, gzip.compress(tar_of("a.jsonl")), "is compressed and holds a tar archive")
            for name in ("a.tar.gz", "a.tgz", "a.jsonl.gz", "a.txt.gz", "a.jsonl.tar.gz")
        ),
        ("a.tar.xz", lzma.compress(tar_of("a.jsonl")), "is compressed and holds a tar archive"),
        *((name, zip_of("a.jsonl"), "is a zip archive") for name in ("a.zip", "a.jsonl", "a.txt")),
        ("a.jsonl.gz", gzip.compress(zip_of("a.jsonl")), "is compressed and holds a zip archive"),
        ("a.zip", b"PK\5\6" + bytes(18), "is an empty zip archive"),
        *(
            (f"a.{kind}.gz", gzip.compress(again(LINES.encode())), TWICE)
            for kind in ("jsonl", "txt", "parquet")
            for again in (gzip.compress, bz2.compress, lzma.compress)
        ),
        ("a.jsonl.bz2", bz2.compress(gzip.compress(LINES.encode())), TWICE),
    ],
)
def test_archives_and_what_was_compressed_twice(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    line = error_of(path)
    assert f"{path} {says}" in line
    assert "unpack it first" in line or "gunzip" in line


def test_a_folder_of_archives(tmp_path):
    for name in ("00000.tar", "00001.TAR.GZ"):
        (tmp_path / name).write_bytes(tar_of("a.jsonl"))
    (tmp_path / "README").write_text("about it")
    line = error_of(tmp_path)
    assert f"data.path={tmp_path}: 0000" in line
    assert "is an archive, which is not supported, and nothing in this folder is read" in line
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert "00000.tar" in start(configure(f"data.path={tmp_path}")).describe()


def test_zstd_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd rest")
    monkeypatch.setattr(opening, "zstd", None)
    line = error_of(path)
    assert "pip install backports.zstd" in line
    assert str(path) in line


# What is not text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bytes(range(256)) * 50, "NUL bytes"),
        ("".join(TEXTS).encode("utf-16"), "UTF-16; convert it"),
        ("".join(TEXTS).encode("utf-16-le"), "NUL bytes, as binary files and UTF-16 do"),
        ("привет мир, как дела ".encode("cp1251") * 50, "are not UTF-8; convert it"),
    ],
)
@pytest.mark.parametrize("name", ["a.bin", "a.txt", "a.TXT.gz", "a"])
def test_what_is_no_text_is_never_trained_on(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    line = error_of(path)
    assert str(path) in line
    assert "is not text" in line
    assert words in line or "UTF-16" in words


def test_other_encodings_of_json_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES.encode("utf-16"))
    assert f"{path} is UTF-16; convert it to UTF-8" in error_of(path)
    record = json.dumps({"text": "привет мир " * 20}, ensure_ascii=False) + "\n"
    path.write_bytes(record.encode("cp1251") * 40)
    assert f"{path} is not text: " in error_of(path)


@pytest.mark.parametrize("form", ["jsonl", "txt", "parquet"])
def test_a_few_bytes_that_are_no_utf8_are_replaced(tmp_path, form):
    content = "un café, un thé, and much more plain text around it; "
    path = tmp_path / f"a.{form}"
    if form == "jsonl":
        path.write_bytes(f'{{"text": "{content}"}}\n'.encode("latin1") * 60)
    elif form == "txt":
        path.write_bytes(content.encode("latin1") * 60)
    else:
        table(path, text=pa.array([content.encode("latin1")] * 60).view(pa.string()))
    replaced = content.replace("é", "\ufffd")
    assert set(texts_of(path)) <= {replaced, replaced * 60}


def test_the_start_says_what_was_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES.encode() + b'{"text": "caf\xe9 and plain text"}\n')
    assert (
        "41 document(s), 1 of them with U+FFFD"
        in data.load(configure(f"data.path={path}")).describe()
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "file"])
def test_lone_surrogates_are_replaced(tmp_path, tokenizer):
    """JSON may hold half a pair, as text that was cut does."""
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + '{"text": "half \\ud83d of \\ud83d\\ude00 and \\ude00"}\n')
    assert texts_of(path)[-1] == "half \ufffd of 😀 and \ufffd"
    data.load(configure(f"data.path={path}"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.txt", "a text"), ("a.jsonl", '{"text": "a text"}\n')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert texts_of(tmp_path / name) == ["a text"]


# JSON


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": text} for text in TEXTS]),
        json.dumps([{"text": text} for text in TEXTS], indent=1),
        "\n".join(json.dumps({"text": text}, indent=2) for text in TEXTS),
        "\n\n" + LINES.replace("\n", "\r\n\r\n"),
        "[\n" + ",\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n]\n",
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_forms_of_json(tmp_path, content, name):
    (tmp_path / name).write_text(content)
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"text": "cut off', "line 41: Unterminated string"),
        ('{"text": 5}', "holds int in {path}, line 41, not text"),
        ('{"text": ["a"]}', "holds list in {path}, line 41, not text"),
        ('"just text"', "line 41 is str, not an object"),
        ("not json", "line 41: Expecting value"),
        ("[" * 100_000, "line 41"),
        ('{"n": ' + "1" * 5000 + "}", "line 41"),
    ],
)
def test_a_broken_record_is_named(tmp_path, bad, words):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text(LINES)
    path = tmp_path / "b.jsonl"
    path.write_text(LINES + bad + "\n" + LINES)
    line = error_of(tmp_path)
    assert line.startswith(f"data.path={tmp_path} cannot be read as json: ")
    assert words.replace("{path}", str(path)) in line
    assert str(path) in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"}, {"text": 5}]', "holds int in {path}, record 2"),
        ('[{"text": "a"},\n {"text": ]', "{path}, line 2: Expecting value"),
        ('{"data": [{"text": "a"}]}', "is not in {path}; its columns are data"),
        ("[1, 2]", "record 1 is int, not an object"),
    ],
)
def test_a_broken_json_file_is_named(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert words.replace("{path}", str(path)) in error_of(path)


def test_only_the_text_column_matters_in_json(tmp_path):
    others: list[dict[str, Any]] = [
        {"id": 1},
        {"id": "one", "score": 1.5},
        {"id": None, "meta": {"a": 1}},
        {"id": [1, "a"], "meta": "none"},
        {"meta": {"a": {"b": "c"}}},
    ]
    for name in ("a.jsonl", "b.jsonl"):
        rows = [{**others[i % 5], "text": text} for i, text in enumerate(TEXTS)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    empty = [{"text": None}, {"id": 3}, {"text": ""}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in empty))
    (tmp_path / "d.jsonl").write_text("")
    assert texts_of(tmp_path) == TEXTS * 2
    assert len(data.load(configure(f"data.path={tmp_path}")).valid) > 0


# Parquet and Arrow


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_every_type_of_string_is_text(tmp_path, kind):
    column = pa.array([None, *TEXTS]).cast(kind)
    assert texts_of(table(tmp_path / "a.parquet", text=column)) == TEXTS


def test_only_the_text_column_matters_in_parquet(tmp_path):
    table(tmp_path / "a.parquet", text=TEXTS)
    table(tmp_path / "b.parquet", dump=["x"] * 40, text=TEXTS)
    table(tmp_path / "c.parquet", text=pa.array(TEXTS, pa.large_string()), dump=[1] * 40)
    table(tmp_path / "d.parquet", text=pa.nulls(3))
    table(tmp_path / "e.parquet", text=pa.array([], pa.null()))
    table(tmp_path / "f.parquet", other=pa.array([], pa.int64()))
    assert texts_of(tmp_path) == TEXTS * 3


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"body": TEXTS}, "data.text_column=text is not in {path}; its columns are body"),
        ({"text": [1] * 40}, "holds int64 in {path}, not text"),
        ({"text": [b"a"] * 40}, "holds binary in {path}, not text"),
        ({"text": [["a"]] * 40}, "holds list<"),
    ],
)
def test_another_column_than_text_is_named_with_its_file(tmp_path, columns, words):
    table(tmp_path / "a.parquet", text=TEXTS)
    path = table(tmp_path / "b.parquet", **columns)
    assert words.replace("{path}", str(path)) in error_of(tmp_path)


def test_a_cut_off_parquet_file_is_named(tmp_path):
    table(tmp_path / "a.parquet", text=TEXTS)
    path = table(tmp_path / "b.parquet", text=TEXTS)
    path.write_bytes(path.read_bytes()[:-50])
    assert f"cannot be read as parquet: {path}: " in error_of(tmp_path)
    path.write_bytes(b"")
    assert f"cannot be read as parquet: {path}: " in error_of(tmp_path)


def test_a_damaged_page_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [os.urandom(2000).hex() for _ in range(3000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, compression="zstd")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    assert f"cannot be read as parquet: {path}, after row 1000: " in error_of(path)


def test_what_save_to_disk_wrote(tmp_path):
    whole = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(40))})
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts_of(tmp_path / "one") == TEXTS
    splits = datasets.DatasetDict({"train": whole, "test": whole.select(range(5))})
    splits.save_to_disk(tmp_path / "two")
    assert texts_of(tmp_path / "two") == TEXTS
    assert find_files(str(tmp_path / "two")).left_out == "split test"
    assert texts_of(tmp_path / "two", split="test") == TEXTS[:5]
    line = error_of(tmp_path / "two", "data.split=dev")
    assert "data.split=dev is not in data.path=" in line
    assert "its splits: train, test" in line
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    assert "data-00001-of-00003.arrow is missing" in error_of(tmp_path / "one")


def test_a_damaged_arrow_file_is_named(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS * 100}).save_to_disk(tmp_path / "a")
    path = tmp_path / "a" / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-5000])
    assert f"cannot be read as arrow: {path}: " in error_of(tmp_path / "a")


# Folders


def test_a_folder_downloaded_from_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    table(tmp_path / "data" / "train-00000-of-00002.parquet", text=TEXTS[:20])
    table(tmp_path / "data" / "train-00001-of-00002.parquet", text=TEXTS[20:])
    table(tmp_path / "data" / "test-00000-of-00001.parquet", text=["a test"])
    table(tmp_path / "data" / "unsupervised-00000-of-00001.parquet", text=["more"])
    (tmp_path / "README.md").write_text("# A data set")
    (tmp_path / "loader.py").write_text("import datasets")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache" / "x.parquet").write_text("not whole")
    assert texts_of(tmp_path) == TEXTS
    assert texts_of(tmp_path, split="test") == ["a test"]
    assert texts_of(tmp_path, split="unsupervised") == ["more"]
    assert (
        "40 document(s); left out: README.md, dataset_infos.json, loader.py, "
        "1 file(s) of split test, 1 file(s) of split unsupervised;"
    ) in data.load(configure(f"data.path={tmp_path}")).describe()
    assert "data.split=dev is not in data.path=" in error_of(tmp_path, "data.split=dev")


@pytest.mark.parametrize(
    ("names", "train"),
    [
        (["train.jsonl", "test.jsonl", "README.md"], ["train.jsonl"]),
        (["en/train/0.jsonl", "en/validation/0.jsonl", "LICENSE.txt"], ["en/train/0.jsonl"]),
        (["c4-train.00000-of-00002.json", "c4-validation.json"], ["c4-train.00000-of-00002.json"]),
        (["train.jsonl", "extra.jsonl", "dev.jsonl"], ["extra.jsonl", "train.jsonl"]),
        (["test.jsonl", "a.jsonl"], ["a.jsonl"]),  # nothing is named train
        (["training_notes.txt", "test_notes.txt"], ["test_notes.txt", "training_notes.txt"]),
        (["part-00000-of-00001.jsonl"], ["part-00000-of-00001.jsonl"]),
    ],
)
def test_which_files_of_a_folder_are_trained_on(tmp_path, names, train):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LINES)
    found = find_files(str(tmp_path))
    assert [str(Path(file).relative_to(tmp_path)) for file in found.files] == train


@pytest.mark.parametrize(
    "names", [["a.py", "a.json"], ["a.jsonl", "b.parquet"], ["a.md", "a.jsonl"]]
)
def test_a_folder_of_several_kinds_is_one_line(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text(LINES)
    line = error_of(tmp_path)
    assert " mixes " in line
    assert "name one kind with a glob" in line


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["test.jsonl"], "data.split=train is not in data.path="),
        (["data/train.csv", "README.md"], "beside README.md nothing in this folder is read, train"),
        (["a.jsonl", "b.jsonl.incomplete"], "b.jsonl.incomplete is an unfinished download"),
        (["a.jsonl", "b.JSONL.PART"], "b.JSONL.PART is an unfinished download"),
    ],
)
def test_a_folder_that_is_no_corpus_is_one_line(tmp_path, names, words):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LINES)
    assert words in error_of(tmp_path)


def test_what_is_not_read_of_a_folder_is_said(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.csv").write_text("text\n1\n")
    assert "left out: b.csv;" in data.load(configure(f"data.path={tmp_path}")).describe()


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz"])
def test_a_table_is_no_text(tmp_path, name):
    (tmp_path / name).write_text("id,text\n1,words\n")
    assert f"{name} is a table, which is not read" in error_of(tmp_path / name)


def test_json_that_is_called_txt_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    assert "a.txt holds JSON; rename it to end in .jsonl" in error_of(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("{ a brace\nand words }\n" * 50)
    assert find_files(str(tmp_path / "b.txt")).kind == "text"


def test_a_column_twice_is_one_line(tmp_path):
    column = pa.array(TEXTS)
    pq.write_table(pa.table([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    assert "has more than one column text; give one another name" in error_of(
        tmp_path / "a.parquet"
    )


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "far").mkdir()
    write_jsonl(tmp_path / "far" / "a.jsonl", TEXTS)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "linked").symlink_to(tmp_path / "far")
    (corpus / "again").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "up").symlink_to(corpus)
    (corpus / "b.jsonl").symlink_to(tmp_path / "far" / "a.jsonl")
    for path in (corpus, corpus / "linked", f"{corpus}/*/*.jsonl"):
        assert texts_of(path) == TEXTS


def test_the_order_in_which_a_folder_is_listed_does_not_matter(tmp_path, monkeypatch):
    """A file system lists a folder in an order of its own, which a copy need not have."""
    for name, text in (("b", TEXTS[0]), ("c", TEXTS[1])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", [text])
    (tmp_path / "d").symlink_to(tmp_path / "b")
    walk = os.walk

    def listed(*args, backwards, **keys):
        for where, inner, names in walk(*args, **keys):
            inner.sort(reverse=backwards)
            yield where, inner, names

    for backwards in (False, True):
        monkeypatch.setattr(files.os, "walk", partial(listed, backwards=backwards))
        assert find_files(str(tmp_path)).files == (f"{tmp_path}/b/a.jsonl", f"{tmp_path}/c/a.jsonl")


def test_a_link_to_nothing_is_one_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "blob")
    assert f"{tmp_path / 'b.jsonl'} is a link to nothing" in error_of(tmp_path)


# Streamed


def stream_config(path: Path, *overrides: str):
    keys = ("data.valid_documents=3", "data.shuffle_buffer=10", *overrides)
    return configure(f"data.name={path}", *keys)


def streamed(path: Path) -> set[str]:
    """What a stream trains on and is validated on, a folder instead of the hub's."""
    corpus = data.load(stream_config(path))
    assert isinstance(corpus.train, datasets.IterableDataset)
    from train.data.sources import load_stream

    _, valid = load_stream(corpus.config)
    return {row["text"] for row in corpus.train} | set(valid["text"])


def test_only_the_text_column_matters_in_a_stream(tmp_path):
    (tmp_path / "json").mkdir()
    for name, other in (("a", {"id": 1}), ("b", {"id": "x", "score": 1.5}), ("c", {"id": None})):
        rows = [{**other, "text": f"{name} {text}"} for text in TEXTS]
        (tmp_path / "json" / f"{name}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows)
        )
    assert streamed(tmp_path / "json") <= {f"{name} {text}" for name in "abc" for text in TEXTS}
    (tmp_path / "parquet").mkdir()
    table(tmp_path / "parquet" / "a.parquet", text=TEXTS)
    table(tmp_path / "parquet" / "b.parquet", dump=["x"] * 40, text=[f"b {t}" for t in TEXTS])
    found = streamed(tmp_path / "parquet")
    assert len(found) > 60
    assert found <= {*TEXTS, *(f"b {text}" for text in TEXTS)}


def test_a_stream_that_is_no_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b"".join(b'{"text": "caf\xe9 %d %s"}\n' % (i, b"and plain text " * 5) for i in range(40))
    )
    assert all("caf\ufffd" in text for text in streamed(tmp_path))


def test_a_broken_record_of_a_stream_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").write_text(LINES + '{"text": "cut off')
    with pytest.raises(ConfigError) as error:
        data.load(stream_config(tmp_path, "data.valid_documents=1000"))
    assert f"data.name={tmp_path} cannot be read: " in one_line(error)
    assert "b.jsonl, line 41: Unterminated string" in one_line(error)


def test_a_text_file_is_read_in_pieces(tmp_path, monkeypatch):
    """Whatever its lines: the pieces are the file, and none is much longer than what was read."""
    monkeypatch.setattr(readers, "PIECE", 7)
    for text in ("", "a", "é" * 50, "line\n" * 9, "a very long line without an end " * 3 + "\n\nx"):
        (tmp_path / "a.txt").write_text(text)
        (document,) = read_documents("text", str(tmp_path / "a.txt"), "text")
        pieces = list(document)
        assert "".join(pieces) == text
        assert all(len(piece) <= 14 for piece in pieces)


def test_suffixes_are_told_in_one_place():
    for suffix, kind in files.KINDS.items():
        assert files.kind_of(f"x{suffix}") == files.kind_of(f"X{suffix.upper()}.gz") == kind
        assert kind in readers.READERS
