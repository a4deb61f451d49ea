"""What ranks were started with is compared once they have met: one line, exit code 2."""

import sys
from pathlib import Path

import pytest

from tests.support.ranks import Training
from tests.support.tiny import argv, checkpoints, repeated


def errors(training: Training) -> list[str]:
    log = training.log.read_text()
    assert "Traceback" not in log, log
    # Each rank says it where no torchrun ends the others.
    return sorted({line for line in log.splitlines() if line.startswith("error: ")})


def only_rank_1(*overrides: str):
    def plant(rank: int) -> None:
        if rank == 1:
            sys.argv += overrides

    return plant


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lr=0.001", "optim.lr: 0.001 and 0.0005"),
        ("model.seq_len=64", "model.seq_len: 64 and 32"),
        ("parallel.expert_parallel=1", "parallel.expert_parallel: 1 and 2"),
        ("train.seed=7", "train.seed: 7 and 0"),
        ("data.path=train", "train"),
    ],
)
def test_other_keys(tmp_path, override, says):
    keys = argv(tmp_path, "a", "train.steps=3")
    with Training(2, keys, tmp_path / "log", only_rank_1(override)) as training:
        assert training.exit_codes() == [2, 2]
    (line,) = errors(training)
    assert "rank 1 on " in line
    assert "and rank 0 on " in line
    assert says in line
    assert not checkpoints(tmp_path / "a")
    assert not list((tmp_path / "a").glob("started_*"))


def test_keys_that_each_rank_has_for_itself(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    own = [f"run.dir={tmp_path / 'link'}", "tracking.project=other", "data.workers=1"]
    keys = argv(tmp_path, "a", "train.steps=2")
    with Training(2, keys, tmp_path / "log", only_rank_1(*own)) as training:
        assert training.exit_codes() == [0, 0]
    assert checkpoints(tmp_path / "a") == [2]


def test_a_run_folder_that_is_not_shared(tmp_path):
    def plant(rank: int) -> None:
        from train import agreement

        agreement.SHARED_S = 0.5
        only_rank_1(f"run.dir={tmp_path / 'own'}")(rank)

    with Training(2, argv(tmp_path, "a", "train.steps=3"), tmp_path / "log", plant) as training:
        assert training.exit_codes() == [2, 2]
    (line,) = errors(training)
    assert f"run.dir={tmp_path / 'own'} of rank 1 on " in line
    assert "is not the folder of rank 0 on " in line
    assert "put run.dir on a file system that all nodes share" in line
    assert not checkpoints(tmp_path / "a")


def test_other_versions(tmp_path):
    def plant(rank: int) -> None:
        from train import agreement

        if rank == 1:
            agreement.versions = lambda: {"torch": "1.0"}  # type: ignore[assignment]

    with Training(2, argv(tmp_path, "a", "train.steps=3"), tmp_path / "log", plant) as training:
        assert training.exit_codes() == [2, 2]
    (line,) = errors(training)
    assert "torch: 1.0 and " in line


@pytest.mark.parametrize("finished", [True, False])
def test_rank_0_decides_whether_the_run_is_finished(tmp_path, finished):
    def plant(rank: int) -> None:
        from train import agreement

        agreement.already_trained = lambda config: finished == (rank == 0)

    keys = argv(tmp_path, "a", "train.steps=3", "checkpoint.every=0")
    with Training(2, keys, tmp_path / "log", plant) as training:
        assert training.exit_codes() == [0, 0]
    assert checkpoints(tmp_path / "a") == ([] if finished else [3])


def test_a_finished_run_is_found_before_any_group(tmp_path):
    keys = argv(tmp_path, "a", "train.steps=2")
    for _ in range(2):
        with Training(2, keys, tmp_path / "log") as training:
            assert training.exit_codes() == [0, 0]
    log = training.log.read_text()
    assert log.count("has already trained 2 steps") == 1
    assert "start     step" not in log
    assert len(repeated(Path(tmp_path / "a"))) == 2
