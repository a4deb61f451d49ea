"""Checkpoints as W&B's model artifacts: what an offline run records of them."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_train
from tests.support.tiny import argv, checkpoints
from tests.train.test_tracking import records
from train.checkpoint import checksums
from train.checkpoint.writer import Writer
from train.config import ConfigError, load
from train.metrics.artifacts import Artifacts
from train.metrics.tracking import Tracker

KEYS = ["tracking.mode=offline", "parallel.expert_parallel=1", "checkpoint.every=2"]
KEYS += ["checkpoint.keep=1", "tracking.pictures_every=0"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def artifacts(run_dir: Path) -> list[Any]:
    """What the offline runs of a folder have recorded, in the order of their starts."""
    found: list[Any] = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        deadline = time.monotonic() + 30
        # W&B's own process may write the last of it after the run has ended.
        while not any(record.HasField("exit") for record in records(path)):
            assert time.monotonic() < deadline, f"{path} has no end"
            time.sleep(0.1)
        found += [record.artifact for record in records(path) if record.HasField("artifact")]
    return found


def steps(found: list[Any]) -> list[int]:
    return [
        int(next(a for a in one.aliases if a != "latest").removeprefix("step_")) for one in found
    ]


def test_all_of_them_though_they_are_rotated_away(tmp_path):
    keys = [*KEYS, "tracking.artifacts=all"]
    assert run_train(1, argv(tmp_path, "a", *keys, "train.steps=6")) == [0]
    run_dir = tmp_path / "a"
    assert checkpoints(run_dir) == [6], "checkpoint.keep=1"
    found = artifacts(run_dir)
    assert steps(found) == [2, 4, 6]
    run_id = (run_dir / "wandb_id").read_text()
    for one, step in zip(found, (2, 4, 6), strict=True):
        assert (one.type, one.name) == ("model", f"checkpoint-{run_id}")
        assert set(one.aliases) == {"latest", f"step_{step}"}
        paths = {entry.path: Path(entry.local_path) for entry in one.manifest.contents}
        assert checksums.NAME in paths
        assert len(paths) > 4
        (folder,) = {path.parent for path in paths.values()}
        assert checksums.damage(folder) is None, "what is to be uploaded is whole"
        assert str(step) in (folder / checksums.ABOUT).read_text()
    # Resumed, nothing is logged again.
    assert run_train(1, argv(tmp_path, "a", *keys, "train.steps=8")) == [0]
    assert steps(artifacts(run_dir)) == [2, 4, 6, 8]


def test_one_that_is_whole_after_the_last_line_was_logged(tmp_path, monkeypatch):
    """The end then rotates it away at once."""
    write = Writer.finish

    def slowly(self, metadata, results):
        time.sleep(2 if self.final.name.endswith("4") else 0)
        write(self, metadata, results)

    monkeypatch.setattr(Writer, "finish", slowly)
    assert run_train(1, argv(tmp_path, "a", *KEYS, "tracking.artifacts=all", "train.steps=5")) == [
        0
    ]
    assert steps(artifacts(tmp_path / "a")) == [2, 4, 5]


@pytest.mark.parametrize(("wanted", "logged"), [("last", [4]), ("none", [])])
def test_the_last_or_none(tmp_path, wanted, logged):
    keys = [*KEYS, f"tracking.artifacts={wanted}", "train.steps=4"]
    assert run_train(1, argv(tmp_path, "a", *keys)) == [0]
    assert steps(artifacts(tmp_path / "a")) == logged
    assert (tmp_path / "a" / "wandb" / "artifacts").exists() == bool(logged)


def fail(self: Tracker, folder: Path, step: int) -> None:
    raise RuntimeError("no room\nthere")


def test_a_failure_leaves_the_training_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Tracker, "checkpoint", fail)
    keys = [*KEYS, "tracking.artifacts=all", "train.steps=4"]
    assert run_train(1, argv(tmp_path, "a", *keys)) == [0]
    assert checkpoints(tmp_path / "a") == [4]


def test_a_failure_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Tracker, "checkpoint", fail)
    for step in (2, 4):
        folder = tmp_path / "a" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    tracker = Tracker.__new__(Tracker)
    tracker.mode = "offline"
    config = load("configs/demo_cpu.yaml", ["tracking.artifacts=all"])
    found = Artifacts(config, tmp_path / "a", tracker, 0)
    found.look()
    found.finish()
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "train.metrics.artifacts"]
    assert warning == (
        "a checkpoint is not logged to W&B, nor any further one; training continues "
        "(RuntimeError: no room there)"
    )


def test_only_wandb_takes_checkpoints():
    for backend in ("tensorboard", "none"):
        keys = [f"tracking.backend={backend}", "tracking.artifacts=last"]
        with pytest.raises(ConfigError, match=f"artifacts=last with backend={backend}: only W&B"):
            load("configs/demo_cpu.yaml", keys)
