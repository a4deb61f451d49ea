"""Two runs do not share a run folder."""

import errno
import fcntl
import multiprocessing
import os
import time

import pytest

from tests.support.ranks import Training, read_metrics, run_train
from tests.support.tiny import argv
from train.__main__ import main
from train.checkpoint import run_lock
from train.config import ConfigError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.2)


def test_a_second_training_of_the_same_run_is_one_line(tmp_path, capsys):
    keys = argv(tmp_path, "a", "train.steps=2000", "parallel.expert_parallel=1")
    with Training(1, keys, tmp_path / "log") as training:
        training.wait_until((tmp_path / "a" / "metrics.jsonl").exists)
        (first,) = training.processes
        assert main(keys) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith(f"error: another run is using {tmp_path / 'a'} (process")
        assert f"process {first.pid} on " in line
        assert first.is_alive()
    first.join()
    assert run_train(1, [*keys, "train.steps=2"]) == [0]  # the lock went with the killed one
    assert read_metrics(tmp_path / "a")[-1]["progress/step"] == 2


def test_the_lock_ends_with_its_holder_and_not_with_what_that_forked(tmp_path):
    """Processes that prepare data outlive a killed rank by seconds."""
    context = multiprocessing.get_context("fork")
    pids = context.SimpleQueue()

    def holder():
        with run_lock.hold(tmp_path):
            child = os.fork()
            if child:
                pids.put(child)
            time.sleep(60)

    process = context.Process(target=holder)
    process.start()
    child = pids.get()
    try:
        with (
            pytest.raises(ConfigError, match="another run is using"),
            run_lock.hold(tmp_path),
        ):
            pass
        process.kill()
        process.join()
        os.kill(child, 0)  # is there
        with run_lock.hold(tmp_path):
            pass
    finally:
        os.kill(child, 9)


def test_other_ranks_and_file_systems_without_locks(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", none)
        with run_lock.hold(tmp_path):
            pass
    monkeypatch.setenv("RANK", "1")
    with run_lock.hold(tmp_path / "not there"):
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / run_lock.NAME).mkdir()
    with pytest.raises(ConfigError, match="in_use: Is a directory"), run_lock.hold(tmp_path):
        pass
