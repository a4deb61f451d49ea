"""A run that goes on is the run that never stopped, bit for bit."""

import shutil
import signal
from pathlib import Path

import pytest

from tests.ranks import Training, read_metrics, run_train
from tests.tiny import argv, checkpoints, differences, repeated
from train.__main__ import main


def train(folder: Path, name: str, ranks: int, *overrides: str) -> Path:
    assert run_train(ranks, argv(folder, name, *overrides)) == [0] * ranks
    return folder / name


def forget(run_dir: Path, *after: int) -> None:
    """Drop the checkpoints after a step."""
    for step in checkpoints(run_dir):
        if step > after[0]:
            shutil.rmtree(run_dir / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize(
    "overrides",
    [
        # A line of metrics is a mean over steps on both sides of a checkpoint, and validations
        # lie between them; data comes from a worker process that is ahead.
        ["train.log_every=3", "data.workers=1", "train.valid_every=2", "train.valid_batches=1"],
        # Routing at random, from the random states.
        ["moe.force_balance=true", "moe.path=fp8_compact", "optim.schedule=wsd"],
    ],
)
def test_stopped_after_any_step_and_resumed(tmp_path, overrides):
    keys = ["train.steps=6", "checkpoint.every=1", "checkpoint.keep=6", *overrides]
    run_dir = train(tmp_path, "a", 2, *keys)
    whole = repeated(run_dir)
    for stop in (1, 4):
        forget(run_dir, stop)
        again = repeated(train(tmp_path, "a", 2, *keys))
        assert not differences(again, whole), stop
        assert checkpoints(run_dir) == [1, 2, 3, 4, 5, 6]


def test_streamed_order_goes_on(tmp_path, monkeypatch):
    """Streamed data remembers nothing: it reads again up to the step."""
    import datasets

    from train import sources

    texts = [f"document {n} says {n * n} and {n**3}. " * 3 for n in range(60)]
    stream = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=2)
    monkeypatch.setattr(sources, "_open_hub", lambda config: stream)
    keys = [
        "data.path=null",
        "data.name=some/text",
        "data.valid_documents=5",
        "train.steps=6",
        "checkpoint.every=3",
    ]
    whole = repeated(train(tmp_path, "a", 2, *keys, "checkpoint.keep=3"))
    forget(tmp_path / "a", 3)
    assert not differences(repeated(train(tmp_path, "a", 2, *keys)), whole)


def test_two_ranks_then_one_then_four(tmp_path):
    """Auxiliary losses are means over one rank's tokens, so they are off here."""
    keys = ["moe.aux_loss_coeff=0", "moe.z_loss_coeff=0", "checkpoint.every=2"]
    whole = read_metrics(train(tmp_path, "whole", 2, *keys, "train.steps=9"))
    want = [row["loss/train"] for row in whole]
    keys += ["train.steps=9"]
    stages = ((2, "bf16", 3), (1, "bf16", 6), (4, "bf16", 9))
    for ranks, path, until in stages:
        # Stopped by steps alone: the schedule is the whole run's.
        run_dir = train_until(tmp_path, ranks, until, f"moe.path={path}", *keys)
        assert checkpoints(run_dir)[-1] == until
    got = [row["loss/train"] for row in read_metrics(tmp_path / "a")]
    assert len(got) == 9
    assert got[:3] == want[:3]
    assert got == pytest.approx(want, abs=2e-5)
    assert want[-1] < want[0] - 0.1, "nothing was learned that could have been lost"


def train_until(folder: Path, ranks: int, until: int, *keys: str) -> Path:
    """Train on `ranks` ranks, experts spread over all, and stop after a step as a signal would."""

    def stop_there(rank: int) -> None:
        from train.preemption import StopRequest

        agreed, steps = StopRequest.agreed, [first]

        def counted(self: StopRequest) -> str | None:
            steps[0] += 1
            if steps[0] == until:
                self._asked = signal.SIGTERM
            return agreed(self)

        StopRequest.agreed = counted  # type: ignore[method-assign]

    first = max(checkpoints(folder / "a"), default=0)
    arguments = argv(folder, "a", *keys, f"parallel.expert_parallel={ranks}")
    with Training(ranks, arguments, folder / "log", stop_there) as training:
        codes = training.exit_codes()
    assert set(codes) <= {0, 75}, training.log.read_text()
    return folder / "a"


def test_another_path_goes_on(tmp_path):
    keys = ["checkpoint.every=2", "checkpoint.keep=4", "train.steps=4"]
    want = repeated(train(tmp_path, "a", 2, *keys, "moe.path=fp8_baseline"))
    forget(tmp_path / "a", 2)
    # These two are the same arithmetic, so the change shows nowhere.
    got = repeated(train(tmp_path, "a", 2, *keys, "moe.path=fp8_compact"))
    assert not differences(got, want)
    forget(tmp_path / "a", 2)
    got = repeated(train(tmp_path, "a", 2, *keys, "moe.path=bf16"))
    assert got[2] == want[2]
    assert got[4]["loss/train"] == pytest.approx(want[4]["loss/train"], abs=0.01)
    assert got[4] != want[4]


def test_another_model_is_refused_with_the_keys(tmp_path, capsys, monkeypatch):
    train(tmp_path, "a", 1, "parallel.expert_parallel=1", "train.steps=1")
    monkeypatch.delenv("RANK", raising=False)
    keys = argv(tmp_path, "a", "parallel.expert_parallel=1", "train.steps=2")
    for override, says in (
        ("model.rope_base=100", "model.rope_base: 10000 there, 100 now"),
        ("moe.top_k=1", "moe.top_k: 2 there, 1 now"),
        ("train.seed=5", "train.seed: 0 there, 5 now"),
        ("train.global_batch=16", "train.global_batch: 8 there, 16 now"),
    ):
        assert main([*keys, override]) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    assert checkpoints(tmp_path / "a") == [1]
