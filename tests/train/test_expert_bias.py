"""`moe.expert_bias` over a run: its effect, its counts, and that it is saved."""

from pathlib import Path

import pytest
import torch

from scripts.export import main as export
from scripts.export import read
from scripts.generate import main as generate
from tests.support.faults import cramp, poison
from tests.support.ranks import Training, read_metrics, run_alone
from tests.support.tiny import Rows, argv, computed
from tests.test_export import printed
from tests.train.test_resume import forget

BIASED = ["moe.expert_bias=true", "moe.aux_loss_coeff=0", "moe.bias_update_rate=0.02"]
KEYS = ["optim.schedule=constant", "model.num_layers=2", "train.steps=6"]
ALONE = "parallel.expert_parallel=1"
BIAS = "moe/expert_bias_max"


def train(folder: Path, name: str, ranks: int, *keys: str, plant=None) -> Rows:
    arguments = argv(folder, name, *KEYS, *keys)
    with Training(ranks, arguments, folder / f"{name}.log", plant) as training:
        assert training.exit_codes(120) == [0] * ranks, training.log.read_text()
    return read_metrics(folder / name)


def test_the_load_gets_more_even(tmp_path):
    keys = [ALONE, "train.steps=60", "moe.num_experts=8", "optim.lr=0.003"]
    plain = train(tmp_path, "plain", 1, *keys, "moe.aux_loss_coeff=0")
    biased = train(tmp_path, "biased", 1, *keys, *BIASED, "moe.bias_update_rate=0.1")
    loads = [sum(row["moe/max_expert_load"] for row in rows[-10:]) / 10 for rows in (plain, biased)]
    assert loads[1] < 0.6 * loads[0]
    assert biased[0][BIAS] == pytest.approx(0.1)
    assert biased[-1][BIAS] > 1
    assert not any(BIAS in row for row in plain)


def test_experts_on_any_number_of_ranks_have_the_same_biases(tmp_path):
    """Also with as many micro-batches as a rank then has to do."""
    want = train(tmp_path, "alone", 1, *BIASED, ALONE, "train.micro_batch=8")
    assert want[-1][BIAS] > 0.05
    for name, ranks, keys in (
        ("accumulated", 1, [ALONE]),
        ("replicas", 4, [ALONE]),
        ("both", 4, ["parallel.expert_parallel=2"]),
        ("spread", 4, ["parallel.expert_parallel=4"]),
    ):
        got = train(tmp_path, name, ranks, *BIASED, *keys)
        for key in (BIAS, "loss/train", "moe/max_expert_load"):
            assert [row[key] for row in got] == pytest.approx([row[key] for row in want], rel=1e-4)


def test_biases_go_on_where_they_were(tmp_path):
    keys = [*BIASED, "checkpoint.every=1", "checkpoint.keep=6", "train.log_every=2"]
    want = computed(train(tmp_path, "a", 2, *keys))
    forget(tmp_path / "a", 3)
    assert computed(train(tmp_path, "a", 2, *keys)) == want
    forget(tmp_path / "a", 4)
    still = train(tmp_path, "a", 2, *keys, "moe.bias_update_rate=0")
    assert still[1][BIAS] == still[2][BIAS] == want[1][BIAS]
    assert "moe.bias_update_rate=0.0 (was 0.02)" in (tmp_path / "a.log").read_text()


def test_only_steps_of_training_that_are_taken_count(tmp_path):
    """Neither a validation nor a skipped step counts."""
    keys = [*BIASED, "moe.bias_update_rate=1", "train.on_nonfinite=skip"]
    nan = poison(0, 0, float("nan"))

    def plant(rank: int) -> None:
        from train import loop

        nan(rank)
        step = loop.step

        def looked_at(training, *args):
            seconds = step(training, *args)
            left = [layer.router.step_load.sum() for layer in training.model.moe_layers()]
            assert not any(left)
            return seconds

        loop.step = looked_at

    rows = train(tmp_path, "a", 2, *keys, plant=plant)
    assert [row[BIAS] for row in rows[:2]] == [0, 1]
    valid = ["train.valid_every=1", "train.valid_batches=1"]
    again = train(tmp_path, "b", 2, *keys, *valid, plant=plant)
    for key in (BIAS, "loss/train"):
        assert [row.get(key) for row in again] == [row.get(key) for row in rows]


def test_a_step_that_is_done_again_counts_once(tmp_path):
    """Twice the counts would most often have the same sign, so it is the counts that are seen."""
    keys = [*BIASED, "model.seq_len=128", "parallel.expert_parallel=2"]

    def plant(rank: int) -> None:
        from models.moe import balance

        cramp(2, 4)(rank)
        update = balance.update

        def looked_at(layers, rate):
            # Of two micro-batches of two sequences, each token with two experts.
            assert [int(layer.router.step_load.sum()) for layer in layers] == [4 * 128 * 2] * 2
            update(layers, rate)

        balance.update = looked_at

    want = train(tmp_path, "null", 2, *keys, "moe.capacity=null", plant=plant)
    got = train(tmp_path, "auto", 2, *keys, "moe.capacity=auto", plant=plant)
    assert computed(got) == computed(want)
    assert sum(row["moe/redone_steps"] for row in got) == 2


def test_an_exported_model_has_its_biases(tmp_path, capsys):
    train(tmp_path, "a", 2, *BIASED)
    file = tmp_path / "model.safetensors"
    assert export([str(tmp_path / "a"), "--out", str(file)]) == 0
    weights = read(file).weights
    biases = [value for name, value in weights.items() if name.endswith("router.expert_bias")]
    assert len(biases) == 2
    assert torch.stack(biases).abs().max() == pytest.approx(
        read_metrics(tmp_path / "a")[-1][BIAS], rel=1e-6
    )
    options = ["--temperature", "0", "--tokens", "8", "--device", "cpu"]
    assert run_alone(printed, generate, [str(file), "def ", *options]).startswith("def ")
    capsys.readouterr()
    assert export([str(tmp_path / "a"), "--out", str(tmp_path / "hf"), "--format", "hf"]) == 2
    assert "moe.expert_bias=true: the routers of Qwen3-MoE" in capsys.readouterr().err
