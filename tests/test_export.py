"""The exported file holds the model that was trained, and completes a prompt."""

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.export import main as export
from scripts.generate import main as generate
from tests.support.ranks import read_metrics, run_alone, run_train
from tests.support.tiny import argv
from train.config import load


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
    """By its validation loss, which the training has logged."""
    file = tmp_path / "model.safetensors"
    assert export([str(run_dir), "--out", str(file)]) == 0
    assert "weights of a after step 40" in capsys.readouterr().out
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


def test_bad_input_is_one_line(run_dir, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.write_text("no model")
    for arguments, says in (
        (["none", "--out", "x"], "none has no whole checkpoint; it has steps: none"),
        (
            [str(run_dir), "--step", "7", "--out", "x"],
            "no whole checkpoint of step 7; it has",
        ),
        ([str(run_dir), "--out", "/proc/nowhere/x"], "/proc/nowhere"),
    ):
        assert export(arguments) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    assert generate([str(broken), "x"]) == 2
    assert f"{broken} cannot be read" in capsys.readouterr().err
