"""Prepared once: the folder that scripts/prepare_data.py makes, trained on as the text itself."""

import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from scripts import prepare_data
from scripts.train_tokenizer import main as train_tokenizer
from scripts.train_tokenizer import train_bpe
from tests.support.ranks import Training
from tests.support.tiny import TWO_LAYERS, differences, repeated
from tests.train.test_data import (  # noqa: F401
    CONFIG,
    configure,
    held_out,
    one_line,
    own_cache,
    rows,
    write_jsonl,
    write_parquet,
)
from train.config import ConfigError, load
from train.data import batches as data
from train.data import prepare as prepare_module
from train.data import prepared, sources, tokens, units
from train.data.fingerprint import differences as changes
from train.data.tokenizer import load_tokenizer

SMALL = ["model.seq_len=16", "train.micro_batch=2", "train.global_batch=4", "data.workers=0"]
TEXTS = [f"document {i}: " + f"word{i} é 日本 😀 " * (5 + i % 7) for i in range(60)]


def prepare(out: Path, *keys: str, workers: int = 1) -> int:
    """The command, in this process; its exit status."""
    split = [] if any(key.startswith("data.valid_fraction") for key in keys) else FIFTH
    argv = [str(CONFIG), "--out", str(out), "--workers", str(workers), *SMALL, *split, *keys]
    return prepare_data.main(argv)


FIFTH = ["data.valid_fraction=0.2"]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def batches_of(*keys: str) -> tuple[list, list]:
    """What a run is trained and validated on."""
    corpus = data.load(configure(*keys))
    return rows(islice(corpus.train_batches(0, 1), 150)), rows(corpus.valid_batches(0, 1))


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    path = tmp_path / "tokenizer.json"
    train_bpe(iter(TEXTS), 300).save(str(path))
    return path


def write_text(folder: Path, form: str) -> Path:
    """TEXTS in a form, some of them twice."""
    folder.mkdir()
    if form == "text":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:02}.txt").write_text(text)
    elif form == "json":
        write_jsonl(folder / "a.jsonl", TEXTS[:25])
        write_jsonl(folder / "b.jsonl", TEXTS[20:])
    elif form == "parquet":
        write_parquet(folder / "a.parquet", [None, *TEXTS, ""])
    else:
        (folder / "book.txt").write_text("\n".join(TEXTS))
    return folder


# The same as the text itself


@pytest.mark.parametrize("seq_len", [16, 37])
@pytest.mark.parametrize("form", ["text", "json", "parquet", "one document"])
def test_a_prepared_folder_gives_the_batches_of_its_text(tmp_path, tokenizer, form, seq_len):
    text, out = write_text(tmp_path / "text", form), tmp_path / "out"
    keys = [f"data.tokenizer={tokenizer}", "model.vocab_size=512"]
    assert prepare(out, f"data.path={text}", *keys) == 0
    keys.append(f"model.seq_len={seq_len}")
    assert batches_of(f"data.path={out}", *keys) == batches_of(f"data.path={text}", *keys)
    before, after = (
        data.load(configure(f"data.path={path}", *keys)).fingerprint() for path in (text, out)
    )
    assert before == after


def test_the_folder_is_a_tokenizer_too(tmp_path, tokenizer):
    """It is enough to train with, wherever it is copied."""
    text, out = write_text(tmp_path / "text", "json"), tmp_path / "out"
    given = load_tokenizer(str(tokenizer))
    assert prepare(out, f"data.path={text}", f"data.tokenizer={tokenizer}") == 0
    moved = tmp_path / "moved"
    out.rename(moved)
    tokenizer.unlink()
    shutil.rmtree(text)
    assert load_tokenizer(str(moved)).digest == given.digest
    assert batches_of(f"data.path={moved}", f"data.tokenizer={moved}")


def test_the_default_is_the_standard_library_here_too(tmp_path, monkeypatch):
    few = [Path(json.__file__), Path(random.__file__), Path(shutil.__file__)]
    monkeypatch.setattr("train.data.files._standard_library", lambda: few)
    assert prepare(tmp_path / "out") == 0
    assert batches_of(f"data.path={tmp_path / 'out'}") == batches_of()


@pytest.mark.slow
def test_losses_are_those_of_a_run_on_the_text_and_a_run_goes_on_from_one_to_the_other(tmp_path):
    """Bit for bit, on two ranks, resumed in the middle from text to folder."""
    out = tmp_path / "out"
    keys = [f"run.dir={tmp_path}", "train.valid_every=2", "parallel.expert_parallel=2"]
    argv = [str(CONFIG), "--out", str(out), "--workers", "1", "data.path=models"]
    assert prepare_data.main(argv) == 0

    def run(name: str, steps: int, path: str | Path) -> None:
        these = [f"run.name={name}", f"train.steps={steps}", f"data.path={path}", *keys]
        log = tmp_path / f"{name}-{steps}.log"
        # A schedule that does not look at the last step, or the two runs would differ by it.
        with Training(2, [*TWO_LAYERS, "optim.schedule=constant", *these], log) as training:
            assert training.exit_codes() == [0, 0], log.read_text()

    run("text", 6, "models")
    run("prepared", 6, out)
    run("resumed", 3, "models")
    run("resumed", 6, out)
    expected = repeated(tmp_path / "text")
    assert any(row["loss/valid"] for row in expected.values())
    for name in ("prepared", "resumed"):
        there = repeated(tmp_path / name)
        for step, row in expected.items():
            if step == 3:  # the last one of the run that was resumed, validated for that reason
                row["loss/valid"] = there[step]["loss/valid"] = None
        assert not differences(expected, there)


# Made by any number of processes, in any number of starts


@pytest.fixture
def small_units(monkeypatch):
    """Make units of a few files, with parts of few characters; in this process only."""
    monkeypatch.setattr(sources, "UNIT", 3000)
    monkeypatch.setattr(units, "PART", 500)
    monkeypatch.setattr(units, "TOGETHER", 200)
    monkeypatch.setattr(tokens, "TOGETHER", 100)


@pytest.mark.usefixtures("small_units")
def test_parts_and_units_change_nothing(tmp_path, monkeypatch):
    text, out = write_text(tmp_path / "text", "text"), tmp_path / "out"
    expected = batches_of(f"data.path={write_jsonl(tmp_path / 'a.jsonl', TEXTS)}")
    assert prepare(out, f"data.path={text}") == 0
    names = {path.name for path in out.glob("*.arrow")}
    assert len({name.split("-")[1] for name in names}) > 2
    assert len({name.split("-")[2] for name in names}) > 2
    assert not (out / prepared.UNFINISHED).exists()
    assert batches_of(f"data.path={out}") == expected


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 3000)
    text = write_text(tmp_path / "text", "text")
    keys = (f"data.path={text}", f"data.tokenizer={tokenizer}")
    for workers in (1, 3):
        assert prepare(tmp_path / str(workers), *keys, workers=workers) == 0
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "3")
    assert len(bytes_of(tmp_path / "1")) > 6


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("what", ["survey_unit", "tokenize_unit", "_add", "write_survey", "about"])
def test_broken_off_anywhere_it_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, what):
    """By an uncaught error, at each call of a function, like a kill."""

    class Killed(BaseException):
        pass

    text, keys = write_text(tmp_path / "text", "text"), ["data.valid_fraction=0.2"]
    assert prepare(tmp_path / "whole", f"data.path={text}", *keys) == 0
    expected = bytes_of(tmp_path / "whole")
    place, name = {
        "survey_unit": ("train.data.prepare", "survey_unit"),
        "tokenize_unit": ("train.data.prepare", "tokenize_unit"),
        "_add": ("train.data.units", "_add"),
        "write_survey": ("train.data.units.Work", "write_survey"),
        "about": ("train.data.prepare", "_about"),
    }[what]
    module = sys.modules.get(place) or units.Work
    right = getattr(module, name)
    calls = 0

    def killed(*args):
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise Killed
        return right(*args)

    monkeypatch.setattr(module, name, killed)
    starts, calls = 0, 3 if what == "about" else 0
    while True:
        starts += 1
        assert starts < 200, "it does not get any further"
        try:
            assert prepare(tmp_path / "out", f"data.path={text}", *keys) == 0
        except Killed:
            continue
        break
    assert starts > 1
    assert bytes_of(tmp_path / "out") == expected


@pytest.mark.usefixtures("small_units")
def test_what_was_tokenized_is_not_tokenized_again(tmp_path, monkeypatch):
    text, out = write_text(tmp_path / "text", "text"), tmp_path / "out"
    right, done = units._add, []

    def counted(batch, files, tokenizer):
        done.append(sum(len(piece) for _, piece in batch))
        if sum(done) > 4000 and len(done) < 100:
            done.extend([0] * 100)
            raise KeyboardInterrupt
        right(batch, files, tokenizer)

    monkeypatch.setattr(units, "_add", counted)
    assert prepare(out, f"data.path={text}") == 130
    assert prepare(out, f"data.path={text}") == 0
    characters = sum(map(len, TEXTS))
    assert characters < sum(done) <= characters + 500 + 200  # no more than the part broken off


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, tokenizer):
    """kill -9 of the command, its processes with it, at 10 random moments."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(4):
        write_jsonl(text / f"{number}.jsonl", [f"{number} {one} " * 200 for one in TEXTS])
    begin = "from train.data import sources, units; sources.UNIT = 1; units.PART = 1 << 18; "
    code = f"{begin}import sys; from scripts.prepare_data import main; sys.exit(main())"
    keys = [f"data.path={text}", f"data.tokenizer={tokenizer}", *FIFTH]

    def command(out: Path, workers: int) -> list[str]:
        argv = [str(CONFIG), "--out", str(out), "--workers", str(workers), *keys]
        return [sys.executable, "-c", code, *argv]

    begun = time.monotonic()
    subprocess.run(command(tmp_path / "whole", 1), check=True)
    seconds = time.monotonic() - begun
    expected = bytes_of(tmp_path / "whole")
    chance = random.Random(0)
    kills = folders = 0
    while kills < 10:
        out = tmp_path / f"out{folders}"
        begun = time.monotonic()
        process = subprocess.Popen(
            command(out, 1 + kills % 2),
            env={**os.environ, "OF_A_TEST": str(tmp_path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # Python's own cleaner of a killed parent speaks there
        )
        try:
            assert process.wait(chance.uniform(0.2, 1.0) * seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert bytes_of(out) == expected
        folders += 1
        seconds = time.monotonic() - begun  # the machine may be less busy now
    out = tmp_path / f"out{folders}"
    subprocess.run(command(out, 2), check=True)
    assert bytes_of(out) == expected
    wait_for(lambda: not left_over(tmp_path), "processes outlive the command")


def wait_for(what, problem: str) -> None:
    """A killed command's process that still imports notices when it has."""
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until, problem
        time.sleep(0.5)


def left_over(folder: Path) -> list[str]:
    """Processes that a killed command left, known by a folder in their environment."""
    mark = os.fsencode(f"OF_A_TEST={folder}")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
    # That of Python's multiprocessing cleans up behind the others, and ends after them.
    return [line for line in found if "resource_tracker" not in line]


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_line_and_the_same_command_goes_on(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sources, "UNIT", 3000)
    text, out = write_text(tmp_path / "text", "text"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "tokenize_unit", killed_unit)
        assert prepare(out, f"data.path={text}", workers=2) == 2
    line = capsys.readouterr().err
    assert "was killed" in line
    assert "with fewer --workers than 2" in line
    assert prepare(out, f"data.path={text}", workers=2) == 0
    assert batches_of(f"data.path={out}") == batches_of(f"data.path={text}")


def killed_unit(work, number, report):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_an_error_of_a_process_is_the_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "UNIT", 1)
    text, out = write_text(tmp_path / "text", "json"), tmp_path / "out"
    (text / "b.jsonl").write_text('{"text": "cut off')
    assert prepare(out, f"data.path={text}", workers=2) == 2
    assert f"{text / 'b.jsonl'}, line 1: " in capsys.readouterr().err
    write_jsonl(text / "b.jsonl", TEXTS)  # and once it is right, the same command does it
    assert prepare(out, f"data.path={text}", workers=2) == 0


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_no_process(tmp_path):
    """To all of them, as a terminal sends it; while they import, and while they work."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(4):
        write_jsonl(text / f"{number}.jsonl", TEXTS * 1000)
    begin = "from train.data import sources; sources.UNIT = 1; "
    begin += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = f"{begin}import sys; from scripts.prepare_data import main; sys.exit(main())"
    argv = [str(CONFIG), "--workers", "2", f"data.path={text}", *FIFTH]
    for number in range(6):
        out = tmp_path / f"out{number}"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--out", str(out), *argv],
            env={**os.environ, "OF_A_TEST": str(tmp_path)},
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (out / prepared.UNFINISHED / prepared.PLAN).exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3 * number)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert said == "stopped; the same command continues where it stopped\n"
        assert process.returncode == 130
        assert not [*out.rglob("*.unfinished")]
    wait_for(lambda: not left_over(tmp_path), "processes outlive the command")


def test_two_at_once_are_one_line(tmp_path, monkeypatch, capsys):
    text, out = write_text(tmp_path / "text", "text"), tmp_path / "out"
    right, codes = prepare_module.tokenize_unit, []

    def meanwhile(*args):
        codes.append(prepare(out, f"data.path={text}"))
        right(*args)

    monkeypatch.setattr(prepare_module, "tokenize_unit", meanwhile)
    assert prepare(out, f"data.path={text}") == 0
    assert codes == [2]
    assert "another prepare_data is running" in capsys.readouterr().err


# A data set of the hub


def hub(tmp_path: Path, texts: list[str], form: str) -> Path:
    """A folder instead of one on the hub, in three files."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for number in range(3):
        part = texts[number::3]
        if form == "json":
            write_jsonl(folder / f"{number}.jsonl", part)
        elif form == "parquet":
            write_parquet(folder / f"{number}.parquet", part)
        else:  # read by `datasets`: a document a line
            (folder / f"{number}.txt").write_text("".join(f"{text}\n" for text in part))
    return folder


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["json", "parquet", "text"])
def test_a_hub_data_set_gives_the_batches_of_its_documents(tmp_path, form, workers):
    folder, out = hub(tmp_path, TEXTS, form), tmp_path / "out"
    texts = [text.strip() if form == "text" else text for text in TEXTS]
    same = write_jsonl(tmp_path / "a.jsonl", [text for n in range(3) for text in texts[n::3]])
    if form == "text":
        (folder / "0.txt").write_text("".join(f"{text}\n" for text in texts[0::3]))
        (folder / "1.txt").write_text("".join(f"{text}\n" for text in texts[1::3]))
        (folder / "2.txt").write_text("".join(f"{text}\n" for text in texts[2::3]))
    assert prepare(out, f"data.name={folder}", workers=workers) == 0
    assert batches_of(f"data.path={out}") == batches_of(f"data.path={same}")


@pytest.mark.parametrize("count", [1, 5])
def test_a_hub_data_set_of_a_few_documents_holds_one_out(tmp_path, count):
    """None of them is below the limit, which is known only when all have been read."""
    keys = ["data.valid_fraction=0.0001"]
    assert not held_out(TEXTS[:count], 0.0001)
    folder, out = hub(tmp_path, TEXTS[:count], "json"), tmp_path / "out"
    assert prepare(out, f"data.name={folder}", *keys) == 0
    same = [text for n in range(3) for text in TEXTS[:count][n::3]]
    path = write_jsonl(tmp_path / "a.jsonl", same)
    expected = batches_of(f"data.path={path}", *keys)
    assert batches_of(f"data.path={out}", *keys) == expected
    assert expected[1]


def test_a_file_of_the_hub_without_its_survey_is_read_again(tmp_path, monkeypatch):
    folder, out = hub(tmp_path, TEXTS, "json"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_about", raise_keyboard_interrupt)
        assert prepare(out, f"data.name={folder}") == 130
    (out / prepared.UNFINISHED / "survey-00001.npz").unlink()
    assert prepare(out, f"data.name={folder}") == 0
    assert prepared.read(out).documents == 60


def test_a_broken_record_of_the_hub_is_named_and_what_was_made_stays(tmp_path, capsys):
    folder, out = hub(tmp_path, TEXTS, "json"), tmp_path / "out"
    right = (folder / "2.jsonl").read_text()
    (folder / "2.jsonl").write_text(right[:-10])
    assert prepare(out, f"data.name={folder}") == 2
    line = capsys.readouterr().err
    assert f"data.name={folder} cannot be read" in line
    assert "2.jsonl, line 20" in line
    assert len([*out.glob("train-*.arrow")]) == 2


# What it says


def test_it_says_what_came_of_it_and_how_to_train_on_it(tmp_path, tokenizer, capsys):
    text, out = write_text(tmp_path / "text", "json"), tmp_path / "out"
    assert prepare(out, f"data.path={text}", f"data.tokenizer={tokenizer}") == 0
    said = capsys.readouterr().out
    valid = len(held_out(TEXTS[:25] + TEXTS[20:]))
    assert f"{out}: 65 document(s), {valid} of them held out; " in said
    assert "5 document(s) are exact copies of another one; they are kept, on its side" in said
    assert said.endswith(f"to train on it: data.path={out} data.tokenizer={out}\n")
    about = prepared.read(out)
    assert (about.documents, about.copies, about.valid_documents) == (65, 5, valid)
    ids = load_tokenizer(str(out)).encode(TEXTS[:25] + TEXTS[20:])
    assert about.tokens("train") + about.tokens("valid") == sum(map(len, ids)) + 65
    assert about.characters == sum(map(len, TEXTS[:25] + TEXTS[20:]))


def test_the_start_of_a_run_says_what_was_prepared(tmp_path):
    text, out = write_text(tmp_path / "text", "json"), tmp_path / "out"
    assert prepare(out, f"data.path={text}") == 0
    line = data.load(configure(f"data.path={out}")).describe()
    assert line.startswith(f"{text}: 2 json file(s), 65 document(s), prepared in {out}; ")


def test_far_lines_say_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "LINES_S", -1.0)
    text = write_text(tmp_path / "text", "text")
    assert prepare(tmp_path / "out", f"data.path={text}") == 0
    said = capsys.readouterr().out
    assert "reading the text: 0.0 million characters\n" in said
    assert "tokenizing: 0.0 of 0.0 million characters\n" in said


def test_the_same_command_again_makes_nothing(tmp_path, monkeypatch, capsys):
    text, out = write_text(tmp_path / "text", "json"), tmp_path / "out"
    assert prepare(out, f"data.path={text}") == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(prepare_module, "_make", None)
    assert prepare(out, f"data.path={text}") == 0
    assert capsys.readouterr().out == first


# Bad input to the command


@pytest.mark.parametrize(
    ("keys", "workers", "words"),
    [
        (["data.path={text}/nothing.txt"], 1, "no such file"),
        (["data.path={text}"], 0, "--workers=0"),
        (["data.mixture={a: 1}"], 1, "prepare each into a folder of its own"),
        (["data.path={text}", "model.vocab_size=256"], 1, "model.vocab_size=257 or more"),
        (["data.path={text}", "data.tokenizer=gone.json"], 1, "no such file"),
        (["data.path={text}", "data.text_column=body"], 1, "data.text_column=body is not in"),
        (["data.path={text}", "data.valid_fraction=2"], 1, "data.valid_fraction"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_result(tmp_path, capsys, keys, workers, words):
    text, out = write_text(tmp_path / "text", "json"), tmp_path / "out"
    keys = [key.replace("{text}", str(text)) for key in keys]
    assert prepare(out, *keys, workers=workers) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (out / prepared.NAME).exists()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file", "is there and no folder"),
        ("link", "is there and no folder"),
        ("full", "is not empty, and not what prepare_data began"),
        ("text", "lies in data.path"),
        ("text/inside", "lies in data.path"),
        ("file/below", "cannot be written (Not a directory)"),
    ],
)
def test_a_place_that_is_taken_is_one_line(tmp_path, capsys, out, words):
    text = write_text(tmp_path / "text", "json")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert prepare(tmp_path / out, f"data.path={text}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"


DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_commands_of_the_documentation(tmp_path, monkeypatch):
    """In their order; a folder stands for the hub's data set, and a run's data is only loaded."""
    text = DOCS.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    config = CONFIG.resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "configs").symlink_to(config.parent)
    for name in ("text", "code", "hub", "folder"):
        (tmp_path / "my" / name).mkdir()
        write_jsonl(tmp_path / "my" / name / "a.jsonl", [f"{name} {one}" * 9 for one in TEXTS])
    done = []
    for line in lines:
        line = line.replace("HuggingFaceFW/fineweb-edu data.subset=sample-10BT", "./my/hub")
        line = line.replace("32768", "512")  # the standard library takes longer with that many
        module, *argv = shlex.split(line.partition(" -m ")[2])
        if module == "train":
            config_file, *keys = argv
            these = load(config_file, [*keys, "data.workers=0"])
            data.check(these)
            next(data.load(these).train_batches(0, 1))
        else:
            assert {
                "scripts.prepare_data": prepare_data.main,
                "scripts.train_tokenizer": train_tokenizer,
            }[module](argv) == 0
        done.append(module)
    assert done.count("train") == 6
    assert done.count("scripts.prepare_data") == 3
    assert done.count("scripts.train_tokenizer") == 2


@pytest.mark.usefixtures("small_units")
def test_a_full_disk_is_one_line_and_what_was_made_stays(tmp_path, monkeypatch, capsys):
    text, out = write_text(tmp_path / "text", "text"), tmp_path / "out"
    flush, calls = tokens.TokenFile._flush, []

    def full(self) -> None:
        calls.append(self)
        if len(calls) == 40:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(tokens.TokenFile, "_flush", full)
    assert prepare(out, f"data.path={text}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written (No space left on device); what was made stays" in line
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrow")}
    assert made
    assert not [*out.glob("*.unfinished")]
    assert prepare(out, f"data.path={text}") == 0
    for name, when in made.items():
        assert (out / name).stat().st_mtime_ns == when


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("what", ["text", "key", "tokenizer"])
def test_something_else_into_a_folder_that_was_begun_is_one_line(
    tmp_path, monkeypatch, capsys, tokenizer, what
):
    text, out = write_text(tmp_path / "text", "text"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_about", raise_keyboard_interrupt)
        assert prepare(out, f"data.path={text}") == 130
    keys, words = [f"data.path={text}"], "the files of the text differ"
    if what == "text":
        (text / "00.txt").write_text("other")
    elif what == "key":
        keys, words = [*keys, "data.valid_fraction=0.3"], "data.valid_fraction differ"
    else:
        keys, words = [*keys, f"data.tokenizer={tokenizer}"], "tokenizer differ"
    for done in (False, True):
        assert prepare(out, *keys) == 2
        assert f"{out} was made of something else: {words}" in capsys.readouterr().err
        if not done and what != "text":
            assert prepare(out, f"data.path={text}") == 0


def raise_keyboard_interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("unfinished/plan.json", b"{", "plan.json is not what prepare_data writes; remove that fo"),
        ("unfinished/survey-00001.npz", b"junk", "survey-00001.npz is not a survey ("),
        ("unfinished/limit", b"\xff", None),
        ("unfinished/done-00001", b"", None),
        ("unfinished/done-00001", None, None),
        ("train-00001-002.arrow", b"cut", None),
        ("train-00001-002.arrow", None, None),
        ("valid-00001-002.arrow.1.unfinished", b"of one that was killed", None),
    ],
)
def test_what_was_begun_and_damaged_is_repaired_or_one_line(
    tmp_path, monkeypatch, capsys, name, content, words
):
    text, out = write_text(tmp_path / "text", "text"), tmp_path / "out"
    assert prepare(tmp_path / "whole", f"data.path={text}") == 0
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_about", raise_keyboard_interrupt)
        assert prepare(out, f"data.path={text}") == 130
    if content is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(content)
    capsys.readouterr()
    assert prepare(out, f"data.path={text}") == (0 if words is None else 2)
    if words is None:
        assert bytes_of(out) == bytes_of(tmp_path / "whole")
    else:
        assert f"error: {out} is damaged: {words}" in capsys.readouterr().err


def test_text_that_changes_meanwhile_is_one_line(tmp_path, monkeypatch, capsys):
    text = tmp_path / "a.jsonl"
    right, then = prepare_module.tokenize_unit, [TEXTS]

    def changed(*args):
        write_jsonl(text, then[0])
        right(*args)

    monkeypatch.setattr(prepare_module, "tokenize_unit", changed)
    for number, texts in enumerate((TEXTS[1:], [*TEXTS, "more"], [*TEXTS[1:], "longer" * 999])):
        write_jsonl(text, TEXTS)
        then[0] = texts
        assert prepare(tmp_path / f"out{number}", f"data.path={text}") == 2
        assert "files changed while they were read; start again" in capsys.readouterr().err
        assert not (tmp_path / f"out{number}" / prepared.NAME).exists()


def test_tokens_are_no_text(tmp_path, capsys):
    text, out = write_text(tmp_path / "text", "json"), tmp_path / "out"
    assert prepare(out, f"data.path={text}") == 0
    assert prepare(tmp_path / "again", f"data.path={out}") == 2
    assert f"data.path={out} holds tokens" in capsys.readouterr().err


# Bad input to a run


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["data.tokenizer={tokenizer}"], "was prepared with, bytes with 257 tokens; set data.to"),
        (["data.valid_fraction=0.02"], "was prepared with 0.2; set it to that"),
        (["data.text_column=body"], "data.text_column=body, and "),
        (["data.split=test"], "data.split=test, and "),
        (["model.seq_len=5000"], "hold no whole sequence of model.seq_len=5000"),
    ],
)
def test_other_keys_than_it_was_prepared_with_are_one_line(tmp_path, tokenizer, keys, words):
    text, out = write_text(tmp_path / "text", "json"), tmp_path / "out"
    assert prepare(out, f"data.path={text}") == 0
    keys = [key.replace("{tokenizer}", str(tokenizer)) for key in keys]
    config = configure(f"data.path={out}", *keys)
    with pytest.raises(ConfigError) as error:
        data.load(config)
    assert words in one_line(error)
    if "seq_len" not in keys[0]:
        with pytest.raises(ConfigError):  # before anything starts
            data.check(config)


def test_the_column_it_was_prepared_with_may_be_named_or_left_out(tmp_path):
    text, out = tmp_path / "a.jsonl", tmp_path / "out"
    write_jsonl(text, TEXTS, column="body")
    column = "data.text_column=body"
    assert prepare(out, f"data.path={text}", column) == 0
    assert batches_of(f"data.path={out}", column) == batches_of(f"data.path={out}")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train-00000-000.arrow", b"", "is damaged: train-00000-000.arrow has 0 bytes, not "),
        ("train-00000-000.arrow", None, "train-00000-000.arrow: No such file or directory"),
        ("train-00000-000.arrow", b"other", "is damaged: "),
        ("prepared.json", b"", "prepared.json is not what prepare_data writes"),
        ("prepared.json", b"{}", "prepared.json is not what prepare_data writes"),
        ("prepared.json", b"[1]", "prepared.json is not what prepare_data writes"),
        ("prepared.json", b"\xff\xfe", "prepared.json is not what prepare_data writes"),
        (
            "prepared.json",
            b'{"version": %d}' % prepared.VERSION,
            "prepared.json is not what prepare_data writes",
        ),
        ("prepared.json", b"[" * 100_000, "prepared.json is not what prepare_data writes"),
        ("prepared.json", b'{"version": 99}', "another version of this code (99, this one reads"),
        ("prepared.json", None, "was not prepared to its end; give the same"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path, name, content, words):
    text, out = write_text(tmp_path / "text", "json"), tmp_path / "out"
    assert prepare(out, f"data.path={text}") == 0
    if content is None:
        (out / name).unlink()
        if name == prepared.NAME:
            (out / prepared.UNFINISHED).mkdir()
            (out / prepared.UNFINISHED / prepared.PLAN).write_text("{}")
    elif content == b"other":  # of the same size
        (out / name).write_bytes(b"x" * (out / name).stat().st_size)
    else:
        (out / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        data.load(configure(f"data.path={out}"))
    assert words in one_line(error)
    assert str(out) in one_line(error)


def test_a_path_out_of_the_folder_is_refused(tmp_path):
    text, out = write_text(tmp_path / "text", "json"), tmp_path / "out"
    assert prepare(out, f"data.path={text}") == 0
    there = json.loads((out / prepared.NAME).read_text())
    name = "train-00000-000.arrow"
    (out / name).rename(tmp_path / name)
    there["files"][f"../{name}"] = there["files"].pop(name)
    (out / prepared.NAME).write_text(json.dumps(there))
    with pytest.raises(ConfigError, match=r"\.\./train-00000-000.arrow: No such file"):
        data.load(configure(f"data.path={out}"))


# How it is read


def test_sequences_cross_the_borders_of_files_and_batches():
    flat = random.Random(0).choices(range(1000), k=103)
    cuts = [0, 1, 1, 40, 41, 90, 103]
    arrays = [np.array(flat[a:b], "uint16") for a, b in pairwise(cuts)]
    found = tokens.Sequences(10, arrays=arrays)
    assert len(found) == 10
    assert found[:]["tokens"].reshape(-1).tolist() == flat[:100]
    assert found[[7, 0]]["tokens"].tolist() == [flat[70:80], flat[:10]]
    part = found.part(3, 4)
    assert part[:]["tokens"].reshape(-1).tolist() == flat[30:70]
    with pytest.raises(IndexError):
        part[[4]]


def test_processes_that_prepare_batches_are_sent_names_and_no_tokens(tmp_path):
    text, out = write_jsonl(tmp_path / "a.jsonl", TEXTS * 50), tmp_path / "out"
    assert prepare(out, f"data.path={text}") == 0
    train = data.load(configure(f"data.path={out}")).train
    assert isinstance(train, tokens.Sequences)
    sent = pickle.dumps(train)
    assert len(sent) < 2000 < train.tokens
    assert pickle.loads(sent)[[3, 1]]["tokens"].tolist() == train[[3, 1]]["tokens"].tolist()
    part = train.part(5, 9)
    again = pickle.loads(pickle.dumps(part))
    assert again[:]["tokens"].tolist() == part[:]["tokens"].tolist()


def test_another_text_is_another_fingerprint(tmp_path):
    folders = []
    for number, texts in enumerate((TEXTS, TEXTS[::-1])):
        path, out = write_jsonl(tmp_path / f"{number}.jsonl", texts), tmp_path / f"out{number}"
        assert prepare(out, f"data.path={path}") == 0
        folders.append(data.load(configure(f"data.path={out}")).fingerprint())
    assert "the text of the documents changed" in changes(*folders)
