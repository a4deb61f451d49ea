"""A run's folder may be anywhere, by links too; what is in the way there is one line."""

import os
import shutil
from pathlib import Path

import pytest

from tests.support.ranks import Training, run_train
from tests.support.tiny import argv, checkpoints, differences, repeated
from train import run_folder
from train.__main__ import main
from train.checkpoint import checksums, files
from train.config import ConfigError

ALONE = "parallel.expert_parallel=1"


def to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("harm", "name", "says"),
    [
        (to_nothing, "", "a link to nothing"),
        (to_nothing, "checkpoints", "a link to nothing"),
        (to_nothing, "metrics.jsonl", "a link to nothing"),
        (to_nothing, "stalled", "a link to nothing"),
        (to_itself, "checkpoints", "Too many levels of symbolic links"),
        (Path.touch, "", "is not a folder, and a run has a folder there; move it away"),
        (Path.touch, "checkpoints", "is not a folder, and a run has a folder there; move it away"),
        (Path.touch, "stalled", "is not a folder, and a run has a folder there; move it away"),
        (Path.mkdir, "metrics.jsonl", "is not a file, and a run has a file there; move it away"),
        (Path.mkdir, "config.yaml", "is not a file, and a run has a file there; move it away"),
        (Path.mkdir, "environment.json", "is not a file, and a run has a file there; move it away"),
        (Path.mkdir, "in_use", "is not a file, and a run has a file there; move it away"),
        (os.mkfifo, "routing.jsonl", "is not a file, and a run has a file there; move it away"),
    ],
)
def test_what_is_in_the_way(tmp_path, capsys, harm, name, says):
    path = tmp_path / "runs" / "a" / name
    path.parent.mkdir(parents=True)
    harm(path)
    assert main(argv(tmp_path / "runs", "a", ALONE, "train.steps=1")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}")
    assert says in said
    assert "choose another run.dir or run.name" in said
    assert said.count("\n") == 1


def test_a_parent_that_is_a_link_to_nothing_and_names_that_are_too_long(tmp_path, capsys):
    to_nothing(tmp_path / "runs")
    assert main(argv(tmp_path / "runs", "a", ALONE, "train.steps=1")) == 2
    assert f"error: {tmp_path / 'runs'}: a link to nothing" in capsys.readouterr().err
    assert main(argv(tmp_path, "a" * 300, ALONE, "train.steps=1")) == 2
    assert "File name too long; make that possible, or choose another" in capsys.readouterr().err


def test_a_folder_that_others_may_write(tmp_path, monkeypatch):
    """As on a file system that is mounted read-only."""
    (tmp_path / "checkpoints").mkdir()
    run_folder.check(tmp_path)
    for refused in (tmp_path, tmp_path / "checkpoints"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda path, mode, refused=refused: path != refused)
            with pytest.raises(ConfigError, match=f"{refused} cannot be written here; make that"):
                run_folder.check(tmp_path)


@pytest.fixture
def elsewhere(tmp_path):
    """A folder on another disk, where there is one."""
    folder = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) / "elsewhere"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["run.dir", "run", "checkpoints"])
def test_a_run_on_another_disk(tmp_path, elsewhere, what):
    """Renamed and resumed there as here: nothing crosses from one file system to the other."""
    link = {
        "run.dir": tmp_path / "runs",
        "run": tmp_path / "runs" / "a",
        "checkpoints": tmp_path / "runs" / "a" / "checkpoints",
    }[what]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    keys = ["checkpoint.every=2", "checkpoint.keep=1", ALONE, "optim.schedule=constant"]
    for steps in (2, 5):
        assert run_train(1, argv(tmp_path / "runs", "a", *keys, f"train.steps={steps}")) == [0]
    run_dir = tmp_path / "runs" / "a"
    assert link.is_symlink()
    assert checkpoints(run_dir) == [5]
    assert os.listdir(run_dir / "checkpoints") == ["step_00000005"]
    assert run_train(1, argv(tmp_path, "whole", *keys, "train.steps=5")) == [0]
    assert not differences(repeated(run_dir), repeated(tmp_path / "whole"))


@pytest.mark.slow
def test_a_checkpoint_that_was_moved_to_another_disk(tmp_path, elsewhere):
    """The run resumes from it; when it is rotated away only the link is deleted."""
    keys = [ALONE, "checkpoint.every=1", "checkpoint.keep=2"]
    assert run_train(1, argv(tmp_path, "a", *keys, "train.steps=2")) == [0]
    newest = files.checkpoint_of(files.folder_of(tmp_path / "a"), 2)
    moved = elsewhere / newest.name
    shutil.move(newest, moved)
    newest.symlink_to(moved)
    with Training(1, argv(tmp_path, "a", *keys, "train.steps=5"), tmp_path / "log") as training:
        assert training.exit_codes() == [0]
    assert "start     step 2 of 5" in training.log.read_text()
    assert sorted(os.listdir(newest.parent)) == ["step_00000004", "step_00000005"]
    assert checksums.damage(moved) is None


@pytest.mark.slow
def test_a_checkpoint_on_a_disk_that_is_not_there(tmp_path):
    """The previous one is used, and the run says so instead of ignoring the link."""
    keys = [ALONE, "checkpoint.every=2", "checkpoint.keep=9"]
    assert run_train(1, argv(tmp_path, "a", *keys, "train.steps=4")) == [0]
    newest = files.checkpoint_of(files.folder_of(tmp_path / "a"), 4)
    shutil.rmtree(newest)
    newest.symlink_to(tmp_path / "not mounted")
    newest.with_name("step_00000004.damaged").symlink_to(tmp_path / "an older one")
    with Training(1, argv(tmp_path, "a", *keys, "train.steps=6"), tmp_path / "log") as training:
        assert training.exit_codes() == [0]
    log = training.log.read_text()
    assert f"damaged checkpoint {newest}: a link to nothing; it is renamed, and the one be" in log
    assert "start     step 2 of 6" in log
    assert newest.with_name("step_00000004.damaged").readlink() == tmp_path / "not mounted"
    assert checkpoints(tmp_path / "a") == [2, 4, 6]
