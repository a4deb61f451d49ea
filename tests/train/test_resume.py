"""A run that continues is the run that never stopped, bit for bit."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.faults import poison
from tests.support.ranks import Training, read_metrics, run_train
from tests.support.tiny import argv, checkpoints, differences, repeated
from tests.train.test_same_run import sign
from train import loop
from train.__main__ import main
from train.optim import build_optimizer


def train(folder: Path, name: str, ranks: int, *overrides: str) -> Path:
    assert run_train(ranks, argv(folder, name, *overrides)) == [0] * ranks
    return folder / name


def forget(run_dir: Path, *after: int) -> None:
    """Drop the checkpoints after a step."""
    for step in checkpoints(run_dir):
        if step > after[0]:
            shutil.rmtree(run_dir / "checkpoints" / f"step_{step:08d}")


@pytest.mark.slow
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


@pytest.mark.slow
def test_streamed_order_goes_on(tmp_path, monkeypatch):
    """Streamed data remembers nothing: it reads again up to the step."""
    import datasets

    from train.data import sources

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


def documents(folder: Path, word: str) -> Path:
    folder.mkdir()
    lines = [json.dumps({"text": f"{word} {n} says {n * n} and {n**3}. " * 5}) for n in range(60)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_same_data_at_another_path_goes_on_and_other_data_does_not(tmp_path):
    here, there = documents(tmp_path / "here", "it"), documents(tmp_path / "there", "it")
    keys = ["parallel.expert_parallel=1", "optim.schedule=constant", "checkpoint.keep=4"]
    long = train(tmp_path, "long", 1, *keys, f"data.path={here}", "train.steps=4")
    short = train(tmp_path, "short", 1, *keys, f"data.path={here}", "train.steps=2")
    train(tmp_path, "short", 1, *keys, f"data.path={there}", "train.steps=4")
    assert not differences(repeated(short), repeated(long))

    shutil.rmtree(there)
    documents(there, "another one")  # under the same name
    again = argv(tmp_path, "short", *keys, f"data.path={there}", "train.steps=6")
    with Training(1, again, tmp_path / "log") as training:
        assert training.exit_codes() == [2]
    line = (tmp_path / "log").read_text().splitlines()[-1]
    assert line.startswith("error: ")
    assert "the text of the documents changed" in line
    assert checkpoints(short) == [2, 4]


def test_a_checkpoint_that_does_not_name_its_data_is_loaded_with_a_warning(tmp_path):
    keys = ["parallel.expert_parallel=1", "optim.schedule=constant"]
    run_dir = train(tmp_path, "a", 1, *keys, "train.steps=1")
    saved = run_dir / "checkpoints" / "step_00000001"
    about = json.loads((saved / "training.json").read_text())
    assert about.pop("data")["tokenizer"]
    (saved / "training.json").write_text(json.dumps(about))
    sign(saved)
    with Training(1, argv(tmp_path, "a", *keys, "train.steps=2"), tmp_path / "log") as training:
        assert training.exit_codes() == [0]
    assert "did not record its data: it may be other data than now" in training.log.read_text()


@pytest.mark.slow
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
        from train.safety.signals import StopRequest

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


@pytest.mark.slow
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


def test_another_model_is_refused_beside_a_damaged_checkpoint(tmp_path, capsys, monkeypatch):
    keys = ["parallel.expert_parallel=1", "checkpoint.every=1"]
    run_dir = train(tmp_path, "a", 1, *keys, "train.steps=2")
    (run_dir / "checkpoints" / "step_00000002" / "training.json").write_text("")
    monkeypatch.delenv("RANK", raising=False)
    assert main(argv(tmp_path, "a", *keys, "train.steps=3", "train.seed=5")) == 2
    assert "train.seed: 0 there, 5 now" in capsys.readouterr().err


def test_fewer_steps_beside_a_damaged_checkpoint(tmp_path):
    """Nothing is left to do, and no checkpoint is named after another step."""
    keys = ["parallel.expert_parallel=1", "checkpoint.every=2", "checkpoint.keep=9"]
    run_dir = train(tmp_path, "a", 1, *keys, "train.steps=4")
    metadata = run_dir / "checkpoints" / "step_00000004" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-1])
    train(tmp_path, "a", 1, *keys, "train.steps=1")
    assert checkpoints(run_dir) == [2]


KINDS = {"plain": False, "fused": True, "prepared": False}


def as_on_a_gpu(monkeypatch, kind: str) -> list[str]:
    """PyTorch has its fused AdamW for CPUs too. Returns the keys for `kind`."""
    monkeypatch.setattr(
        loop,
        "build_optimizer",
        lambda model, config, fused, dtype: build_optimizer(model, config, KINDS[kind], dtype),
    )
    return [f"optim.prepare_weights={kind == 'prepared'}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [("plain", "fused"), ("prepared", "fused"), ("fused", "prepared"), ("fused", "plain")]
)
def test_another_kind_of_adamw_goes_on(tmp_path, monkeypatch, kinds):
    """From a CPU to a GPU and back, or with weights prepared and without."""
    keys = ["parallel.expert_parallel=1", "optim.schedule=constant", "optim.clip_grad=0.1"]
    whole = read_metrics(train(tmp_path, "whole", 1, *keys, "train.steps=4"))
    for steps, kind in zip((2, 4), kinds, strict=True):
        more = as_on_a_gpu(monkeypatch, kind)
        run_dir = train(tmp_path, "a", 1, *keys, f"train.steps={steps}", *more)
    for key in ("loss/train", "optim/grad_norm"):
        got = [row[key] for row in read_metrics(run_dir)]
        assert got == pytest.approx([row[key] for row in whole], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_before_the_first_update_changes_nothing(tmp_path, monkeypatch, kind):
    """The first step is skipped, so that the first save finds an optimizer without a state."""
    keys = ["parallel.expert_parallel=1", "train.steps=4", "train.on_nonfinite=skip"]
    keys += as_on_a_gpu(monkeypatch, kind)
    runs = []
    for every in (1, 0):
        more = argv(tmp_path, f"every-{every}", *keys, f"checkpoint.every={every}")
        fault = poison(0, 0, float("nan"))
        with Training(1, more, tmp_path / f"log-{every}", fault) as training:
            assert training.exit_codes() == [0]
        runs.append(repeated(tmp_path / f"every-{every}"))
    assert runs[0][4]["loss/train"] > 0
    assert not differences(*runs)


def test_a_schedule_may_change_on_resume_and_that_is_said(tmp_path):
    """As after NaN, whose line says: lower optim.lr. The new keys take effect."""
    keys = ["parallel.expert_parallel=1", "train.steps=4", "checkpoint.every=2"]
    train(tmp_path, "a", 1, *keys, "optim.schedule=constant", "optim.weight_decay=0")
    for name, more, says in (
        ("a", ["optim.schedule=constant", "optim.weight_decay=0"], None),
        ("rate", ["optim.lr=0.0001", "optim.weight_decay=0"], "optim.lr=0.0001 (was 0.0005)"),
        ("decay", ["optim.schedule=constant", "optim.weight_decay=500"], "optim.weight_decay=500"),
        (
            "path",
            ["optim.schedule=constant", "optim.weight_decay=0", "moe.path=fp8_compact"],
            "moe.path=fp8_compact (was bf16)",
        ),
    ):
        if name != "a":
            shutil.copytree(tmp_path / "a", tmp_path / name)
        forget(tmp_path / name, 2)
        with Training(1, argv(tmp_path, name, *keys, *more), tmp_path / "log") as training:
            assert training.exit_codes() == [0]
        log = training.log.read_text()
        changed = [line for line in log.splitlines() if line.startswith("changed")]
        assert (says in changed[0]) if says else not changed
        changes = tmp_path / name / "changes.jsonl"
        assert changes.exists() == bool(says)
        if says:
            row = json.loads(changes.read_text())
            assert row["progress/step"] == 3
            assert all(key in says or key == "optim.schedule" for key in row["changed"])
            before, now = row["changed"][says.partition("=")[0]]
            assert f"{says.partition('=')[0]}={now} (was {before})" in changed[0]
    before, rate, decay = (repeated(tmp_path / name) for name in ("a", "rate", "decay"))
    assert rate[2] == decay[2] == before[2]
    assert rate[3]["optim/lr"] == pytest.approx(0.0001, rel=0.5)
    assert before[3]["optim/lr"] == decay[3]["optim/lr"] == 0.0005
    # The loss of step 3 is that of the weights before its update.
    assert decay[3]["loss/train"] == before[3]["loss/train"]
    assert abs(decay[4]["loss/train"] - before[4]["loss/train"]) > 1e-3


@pytest.mark.parametrize("key", ["optim.beta1=0.8", "optim.eps=1e-6", "data.valid_fraction=0.1"])
def test_another_training_is_refused(tmp_path, capsys, monkeypatch, key):
    train(tmp_path, "a", 1, "parallel.expert_parallel=1", "train.steps=1")
    monkeypatch.delenv("RANK", raising=False)
    assert main([*argv(tmp_path, "a", "parallel.expert_parallel=1", "train.steps=2"), key]) == 2
    assert key.partition("=")[0] in capsys.readouterr().err
