"""The exported file holds the model that was trained, and completes a prompt."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.export import main as export
from scripts.export import read, write
from scripts.generate import main as generate
from scripts.train_tokenizer import train_bpe
from tests.support.ranks import read_metrics, run_alone, run_train
from tests.support.tiny import argv
from tests.train.test_same_run import sign
from train.config import ConfigError, load
from train.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    keys = ["train.steps=40", "checkpoint.every=20", "optim.lr=0.01", "moe.path=fp8_compact"]
    keys += ["train.valid_every=40", "train.valid_batches=2", "model.qk_norm=true"]
    assert run_train(2, argv(folder, "a", *keys)) == [0, 0]
    return folder / "a"


def validation_loss(model_file: Path, config_file: Path) -> float:
    from scripts.generate import load_model
    from train.data import batches as data

    model, _, _ = load_model(model_file, "cpu")
    corpus = data.load(load(config_file))
    with torch.no_grad():
        losses = [model(batch.tokens, batch.labels) for batch in corpus.valid_batches(0, 1)]
    return float(torch.cat([loss.flatten() for loss in losses]).mean())


def test_the_file_is_the_model(run_dir, tmp_path, capsys):
    """By its validation loss, which the run has logged."""
    file = tmp_path / "model.safetensors"
    assert export([str(run_dir), "--out", str(file)]) == 0
    assert "weights of a after step 40" in capsys.readouterr().out
    other = tmp_path / "any"
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode, "others may read it too"
    weights = load_file(file)
    assert weights["decoder.layers.0.mlp.experts.up"].shape[0] == 4, "experts of both ranks"
    want = read_metrics(run_dir)[-1]["loss/valid"]
    got = run_alone(validation_loss, file, run_dir / "config.yaml")
    assert got == pytest.approx(want, abs=1e-5)
    assert want < 4


def test_any_checkpoint(run_dir, tmp_path, capsys):
    assert export([str(run_dir), "--step", "20", "--out", str(tmp_path / "a")]) == 0
    newest = run_dir / "checkpoints" / "step_00000040"
    assert export([str(newest), "--out", str(tmp_path / "b")]) == 0
    assert "after step 20" in capsys.readouterr().out
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert a.keys() == b.keys()
    assert not torch.equal(a["output_layer.weight"], b["output_layer.weight"])


def printed(main: Callable[[list[str]], int], argv: list[str]) -> str:
    """What a command prints."""
    with redirect_stdout(io.StringIO()) as out:
        assert main(argv) == 0
    return out.getvalue()


@pytest.mark.slow
def test_generate_completes_a_prompt(run_dir, tmp_path):
    file = tmp_path / "model.safetensors"
    assert export([str(run_dir), "--out", str(file)]) == 0

    def complete(*options: str) -> str:
        return run_alone(printed, generate, [str(file), "def ", *options])

    command = [sys.executable, "-m", "scripts.generate", str(file), "def "]
    command += ["--temperature", "0", "--tokens", "40", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    greedy = done.stdout.decode()
    assert greedy.startswith("def ")
    assert len(greedy) > 20, "longer than the context of 32 tokens with its prompt"
    assert complete("--temperature", "0", "--tokens", "40", "--path", "bf16").startswith("def ")
    drawn = complete("--temperature", "1", "--tokens", "20", "--seed", "1")
    assert drawn != complete("--temperature", "1", "--tokens", "20", "--seed", "2")
    few = ("--tokens", "3", "--path", "bf16")
    assert complete("--temperature", "1e-300", *few) == complete("--temperature", "0", *few)


def run_generate(*arguments: object, **environment: str) -> tuple[int, str, str]:
    command: list[str | bytes] = [sys.executable, "-m", "scripts.generate"]
    command += [os.fsencode(str(one)) for one in arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, timeout=120
    )
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@pytest.mark.slow
def test_the_file_holds_its_tokenizer(run_dir, tmp_path):
    """It completes a prompt where the tokenizer that it was trained with is not."""
    tokenizer = tmp_path / "tokenizer.json"
    texts = ["def a(b): return b", "\N{LATIN SMALL LETTER E WITH ACUTE}t\xe9"] * 20
    bpe = train_bpe(iter(texts), 260)
    bpe.add_special_tokens(["<|over|>"])  # beside the one of a usual name
    bpe.save(str(tokenizer))
    keys = ["train.steps=1", f"data.tokenizer={tokenizer}", "parallel.expert_parallel=1"]
    keys += ["data.eod_token=<|over|>"]
    assert run_train(1, argv(tmp_path, "a", *keys)) == [0]
    file = tmp_path / "model.safetensors"
    assert export([str(tmp_path / "a"), "--out", str(file)]) == 0
    want = load_tokenizer(str(tokenizer), "<|over|>")
    tokenizer.unlink()
    got = read(file).tokenizer
    assert got is not None
    assert (got.eod, got.vocab_size) == (want.eod, want.vocab_size)
    assert [list(ids) for ids in got.encode(texts)] == [list(ids) for ids in want.encode(texts)]
    code, out, err = run_generate(file, "def a", "--tokens", "3", "--device", "cpu")
    assert code == 0, err
    assert out.startswith("def a")
    # Without the file the weights can still be exported.
    assert export([str(tmp_path / "a"), "--out", str(file)]) == 0
    assert read(file).tokenizer is None
    assert generate([str(file), "x", "--device", "cpu"]) == 2


@pytest.fixture(scope="module")
def model_file(run_dir, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    assert export([str(run_dir), "--out", str(file)]) == 0
    return file


@pytest.mark.slow
def test_any_prompt_and_any_terminal(model_file):
    for prompt, encoding in (("d\u00e9f \u4e16", "ascii"), ("d\udce9f", "utf-8"), ("", "latin-1")):
        options = ("--tokens", "8", "--device", "cpu")
        code, out, err = run_generate(model_file, prompt, *options, PYTHONIOENCODING=encoding)
        assert code == 0, err
        assert err == ""
        assert out.startswith(prompt[:1])
        if encoding == "ascii":
            assert out.startswith("d?f ?")


@pytest.mark.slow
def test_nobody_reads_on(model_file):
    """As of `| head`."""
    command = f"{sys.executable} -m scripts.generate {model_file} x --tokens 2 --device cpu"
    done = subprocess.run(
        ["bash", "-c", f"{command} 2>&1 >&- | cat; {command} | true"],
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert "Traceback" not in done.stdout + done.stderr


def refused(arguments: list[str]) -> tuple[int, str]:
    """The exit code of `generate`, and what it says of it."""
    with redirect_stderr(io.StringIO()) as said:
        code = generate(arguments)
    return code, said.getvalue()


def test_bad_options_of_generate_are_one_line(run_dir, model_file, tmp_path, capsys, monkeypatch):
    weights, config, step, tokenizer = read(model_file)
    other = tmp_path / "other"

    def written(weights, config=config):
        write(other, weights, config, step, tokenizer)
        return str(other)

    for arguments, says in (
        ([str(model_file), "x", "--path", "fp8"], "--path fp8: no such path; known: bf16, fp8_"),
        ([str(model_file), "x", "--device", "cuda"], "--device cuda: PyTorch sees no GPU here"),
        ([str(run_dir), "x"], f"python -m scripts.export {run_dir} --out"),
        ([str(tmp_path / "none"), "x"], "none cannot be read"),
        ([written({"output_layer.weight": weights["output_layer.weight"]}), "x"], "lacks weights"),
    ):
        device = [] if "--device" in arguments else ["--device", "cpu"]
        # In a process of its own: a group leaves threads behind, and later tests fork.
        code, err = run_alone(refused, [*arguments, *device])
        assert code == 2
        assert says in err
        assert err.count("\n") == 1
    for option in (
        "--tokens=-1",
        "--temperature=nan",
        "--temperature=-1",
        "--seed=99999999999999999999",
    ):
        with pytest.raises(SystemExit) as ended:
            generate([str(model_file), "x", option])
        assert ended.value.code == 2
        assert "from 0 to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "was not written by scripts.export"),
        ({"config": '{"sparkle": 3}', "step": "1"}, "a config that this version does not know"),
        ({"config": "CONFIG", "step": "x"}, "that cannot be read"),
        ({"config": "CONFIG", "step": "1", "tokenizer": '["{}", "a", 3]'}, "that cannot be read"),
    ],
)
def test_a_file_of_somebody_else_is_one_line(model_file, tmp_path, metadata, says):
    config = read(model_file).config.model_dump_json()
    file = tmp_path / "a"
    values = {key: value.replace("CONFIG", config) for key, value in metadata.items()}
    save_file({"a": torch.ones(1)}, file, values)
    with pytest.raises(ConfigError, match=says):
        read(file)


def test_a_damaged_checkpoint_is_named(run_dir, tmp_path, capsys):
    """By its own folder it is refused; in a run the one before it is taken, and that is said."""
    copy = shutil.copytree(run_dir, tmp_path / "a")
    newest = copy / "checkpoints" / "step_00000040"
    with (newest / "__0_0.distcp").open("r+b") as file:
        file.write(b"not a zip")
    assert export([str(newest), "--out", str(tmp_path / "x")]) == 2
    assert "step_00000040: __0_0.distcp is not what was written" in capsys.readouterr().err
    assert export([str(copy), "--out", str(tmp_path / "x")]) == 0
    said = capsys.readouterr()
    assert "the one before it is tried" in said.err
    assert "after step 20" in said.out


def test_a_checkpoint_of_another_version_is_one_line(run_dir, tmp_path, capsys):
    """Its .metadata is a pickle, of classes that this PyTorch may not have."""
    folder = shutil.copytree(run_dir / "checkpoints" / "step_00000040", tmp_path / "c")
    (folder / ".metadata").write_bytes(b"cnowhere\nNothing\n.")
    sign(folder)
    assert export([str(folder), "--out", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert "cannot be read by this version" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("form", ["native", "hf"])
def test_ctrl_c_leaves_nothing(run_dir, tmp_path, monkeypatch, form):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.checkpoint.hf_writer.readable", stop)  # once a file is written
    with pytest.raises(KeyboardInterrupt):
        export([str(run_dir), "--out", str(tmp_path / "x"), "--format", form])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_made(run_dir, tmp_path):
    """As for the other format."""
    assert export([str(run_dir), "--out", str(tmp_path / "new" / "x")]) == 0
    assert read(tmp_path / "new" / "x").step == 40


def test_bad_input_is_one_line(run_dir, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.write_text("no model")
    newest = run_dir / "checkpoints" / "step_00000040"
    assert export([str(newest), "--step", "40", "--out", str(tmp_path / "y")]) == 0
    os.mkfifo(tmp_path / "pipe")  # a device alike: /dev/null must not become a file
    capsys.readouterr()
    for arguments, says in (
        ([str(run_dir), "--out", str(tmp_path / "pipe")], "is a device or a pipe; name a file"),
        (["none", "--out", "x"], "none: no such folder"),
        (["tests", "--out", "x"], "tests has no whole checkpoint; it has steps: none"),
        ([str(newest), "--step", "20", "--out", "x"], "is the checkpoint of step 40; leave"),
        ([str(run_dir), "--out", str(tmp_path)], "is a folder; name the file to write"),
        ([str(run_dir), "--out", ""], "is a folder; name the file to write"),
        (
            [str(run_dir), "--step", "7", "--out", "x"],
            "no whole checkpoint of step 7; it has",
        ),
        ([str(run_dir), "--out", "/proc/nowhere/x"], "/proc/nowhere"),
        # Before the checkpoint is read: there is none.
        (["none", "--out", str(broken / "x")], "broken/x cannot be written: Not a directory"),
        (["none", "--out", "x" * 300], "cannot be written: File name too long"),
    ):
        assert export(arguments) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    assert generate([str(broken), "x"]) == 2
    assert f"{broken} cannot be read" in capsys.readouterr().err
