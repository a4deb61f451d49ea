"""Steps that are skipped have a limit; an infinity that FP8 hides is noticed anyway."""

import json
from pathlib import Path

import pytest
import torch

from models.fp8 import overflow, reference
from models.fp8.tensor import Layout
from models.moe.paths import PATHS
from tests.support.faults import poison
from tests.support.ranks import Training, read_metrics
from tests.support.tiny import argv, checkpoints

FP8 = [path for path in PATHS if path.startswith("fp8")]


def poison_from(step: int, until: int = 10_000):
    """Every loss of rank 1 is NaN in these steps, counted from 0."""

    def plant(rank: int) -> None:
        from train import loop

        real_step, real_losses, now = loop.step, loop.losses, [0]

        def counted(training, *args):
            now[0] = training.done
            return real_step(training, *args)

        def losses(*args):
            bad = rank == 1 and step <= now[0] < until
            return real_losses(*args) * (float("nan") if bad else 1.0)

        loop.step, loop.losses = counted, losses

    return plant


SKIP = ["train.on_nonfinite=skip", "train.nonfinite_limit=4"]


def test_skipped_steps_in_a_row_have_a_limit(tmp_path):
    """What was good is kept, though every step is one to save at, and one checkpoint is kept."""
    keys = [*SKIP, "train.steps=50", "checkpoint.every=1", "checkpoint.keep=1"]
    with Training(2, argv(tmp_path, "a", *keys), tmp_path / "log", poison_from(5)) as training:
        assert training.exit_codes() == [1, 1]
    log = training.log.read_text()
    assert log.count("its update is skipped") == 1, "one warning for a series"
    assert "WARNING: the loss of step 6 is nan: rank 1, micro-batch 0" in log
    (line,) = {line for line in log.splitlines() if line.startswith("error: ")}
    assert "error: the loss of step 9 is nan" in line
    assert "the last of train.nonfinite_limit=4 skipped steps in a row" in line
    assert checkpoints(tmp_path / "a") == [5]


def test_a_good_step_ends_a_series(tmp_path):
    keys = [*SKIP, "train.steps=12", "checkpoint.every=1", "checkpoint.keep=20"]

    def plant(rank: int) -> None:
        poison_from(2, until=5)(rank)
        poison_from(6, until=9)(rank)

    with Training(2, argv(tmp_path, "a", *keys), tmp_path / "log", plant) as training:
        assert training.exit_codes() == [0, 0]
    log = training.log.read_text()
    assert log.count("its update is skipped") == 2
    # Nothing is saved between the first skipped step of a series and the next good one.
    assert checkpoints(tmp_path / "a") == [1, 2, 6, 10, 11, 12]


def test_a_loss_from_before_is_not_how_the_run_ended(tmp_path):
    keys = [*SKIP, "train.steps=6", "train.log_every=2", "tracking.mode=offline"]
    with Training(2, argv(tmp_path, "a", *keys), tmp_path / "log", poison_from(4)) as training:
        assert training.exit_codes() == [0, 0]
    (done,) = [line for line in training.log.read_text().splitlines() if line.startswith("done")]
    assert "training loss" not in done
    assert "loss/train" not in read_metrics(tmp_path / "a")[-1]


def overflowing(where: str, rank_that: int, step: int):
    """One value of an expert's result is infinite, in one micro-batch of one rank."""

    def plant(rank: int) -> None:
        from train import loop

        real_step, real, now = loop.step, getattr(reference, where), [0, 0]

        def counted(training, *args):
            now[:] = [training.done, 0]
            return real_step(training, *args)

        def planted(*args):
            now[1] += 1
            if rank == rank_that and now == [step, 2]:
                one = args[0].clone()  # h forward, da backward
                row = args[-1].nonzero()[0]
                one[row, 1] = float("inf")
                args = (one, *args[1:])
            return real(*args)

        loop.step = counted
        setattr(reference, where, planted)

    return plant


@pytest.mark.parametrize("where", ["swiglu", "swiglu_backward"])
@pytest.mark.parametrize("path", ["fp8_baseline", "fp8_compact"])
def test_an_infinity_that_fp8_hides_stops_the_training(tmp_path, path, where):
    keys = argv(tmp_path, "a", f"moe.path={path}", "train.steps=8", "train.log_every=4")
    with Training(2, keys, tmp_path / "log", overflowing(where, 1, 2)) as training:
        assert training.exit_codes() == [1, 1]
    (line,) = {line for line in training.log.read_text().splitlines() if line[:6] == "error:"}
    assert "step 3 has an infinity inside the experts, which FP8 hides: rank 1, " in line
    # Step 3 holds sequences 16 to 23, micro-batches of two; rank 1 has the second of two.
    assert "micro-batch 1, which holds sequences 22 to 23 of the training order" in line
    assert checkpoints(tmp_path / "a") == []


def test_a_step_with_a_hidden_infinity_is_skipped_by_config(tmp_path):
    keys = argv(tmp_path, "a", "moe.path=fp8_compact", "train.steps=5", *SKIP)
    with Training(2, keys, tmp_path / "log", overflowing("swiglu", 0, 2)) as training:
        assert training.exit_codes() == [0, 0]
    rows = read_metrics(tmp_path / "a")
    assert [row.get("optim/skipped_steps", 0) for row in rows] == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(("when", "logged"), [("in it", None), ("before", 0)])
def test_a_hidden_infinity_in_validation_is_in_its_loss(tmp_path, when, logged):
    def plant(rank: int) -> None:
        from train import loop

        validate, losses = loop.validate, loop.losses

        def note(wanted: bool) -> None:
            if wanted and rank == 1:
                overflow.note_on(torch.device("cpu")).fill_(1)

        def validated(training, corpus):
            note(when == "before")
            return validate(training, corpus)

        def computed(model, *args):
            note(when == "in it" and not model.training)
            return losses(model, *args)

        loop.validate, loop.losses = validated, computed

    keys = ["moe.path=fp8_compact", "train.steps=4", "train.valid_every=2"]
    with Training(2, argv(tmp_path, "a", *keys), tmp_path / "log", plant) as training:
        assert training.exit_codes() == [0, 0]
    rows = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row).get("loss/valid", 0) for row in rows]
    assert [loss and 0 for loss in losses] == [0, logged, 0, logged]


@pytest.mark.parametrize("path", FP8)
def test_a_weight_that_fp8_hides_stops_the_training(tmp_path, path):
    """Quantized, an infinite weight is 448."""

    def plant(rank: int) -> None:
        from train import loop

        step = loop.step

        def planted(training, *args):
            seconds = step(training, *args)
            if training.done == 3 and rank == 1:
                training.model.local_expert_weights()[1].detach().view(-1)[5] = float("inf")
            return seconds

        loop.step = planted

    keys = argv(tmp_path, "a", f"moe.path={path}", "train.steps=8", "train.log_every=4")
    with Training(2, keys, tmp_path / "log", plant) as training:
        assert training.exit_codes() == [1, 1]
    (line,) = {line for line in training.log.read_text().splitlines() if line[:6] == "error:"}
    assert "a weight of the experts is not finite in bfloat16 after step 4" in line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_overflows_in_swiglu_is_noted(dtype):
    """Finite values whose product is not; padding, whose weight is 0, may hold anything."""
    note = overflow.note_on(torch.device("cpu")).zero_()
    large = torch.finfo(dtype).max
    h = torch.ones(4, 256, dtype=dtype)
    da = torch.ones(4, 128, dtype=dtype)
    probs = torch.tensor([1.0, 0.5, 0.0, 0.0])
    h[2] = torch.inf
    da[3] = torch.inf
    for operations in (
        lambda: reference.swiglu(h, probs),
        lambda: reference.swiglu_quantize(h, probs, Layout.COMPACT),
        lambda: reference.swiglu_backward(da, h, probs),
        lambda: reference.swiglu_backward_quantize(da, h, probs, Layout.COMPACT),
    ):
        operations()
        assert note == 0
    h[0, 5], h[0, 133] = large, large
    reference.swiglu(h, probs)
    assert note == 1
    note.zero_()
    h[0] = 1
    da[1, 7], h[1, 135] = large, large
    reference.swiglu_backward(da, h, probs)
    assert note == 1


def test_one_bad_step_is_no_series(tmp_path: Path):
    keys = argv(tmp_path, "a", "train.steps=6", "train.on_nonfinite=skip")
    with Training(2, keys, tmp_path / "log", poison(5, 0, float("inf"))) as training:
        assert training.exit_codes() == [0, 0]
    assert checkpoints(tmp_path / "a") == [6], "the end is saved anyway "
