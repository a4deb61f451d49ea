"""How an error is reported: the line, the exit code, and which rank reports first."""

import errno

import pytest

from train.config import ConfigError
from train.failure import (
    PATIENCE_S,
    Preempted,
    TrainingFailed,
    explain,
    refuse_while_stopped,
)


@pytest.mark.parametrize(
    ("error", "begins", "code", "patience"),
    [
        (ConfigError("a line"), "error: a line", 2, (0, PATIENCE_S)),
        (
            ConfigError("Caught in worker\nTraceback\ntrain.config.ConfigError: a line\n"),
            "error: a line",
            2,
            (0, PATIENCE_S),
        ),
        (TrainingFailed("a line"), "error: a line", 1, (0, PATIENCE_S)),
        (RuntimeError("DataLoader worker\nis killed"), "error: rank {rank}: a process", 1, (0, 0)),
        (
            RuntimeError("[gloo] Connection closed by peer [::1]"),
            "error: rank {rank} lost another rank",
            1,
            (PATIENCE_S, PATIENCE_S),
        ),
        (
            OSError(28, "No space left on device", "runs/a/config.yaml"),
            "error: rank {rank}: runs/a/config.yaml cannot be written (No space left on device)",
            1,
            (0, PATIENCE_S),
        ),
        (
            OSError(27, "File too large"),  # as after ulimit -f
            "error: rank {rank}: a file of the run cannot be written (File too large); free some",
            1,
            (0, PATIENCE_S),
        ),
        *(
            (
                OSError(number, "a reason", "runs/a/config.yaml"),
                "error: rank {rank}: runs/a/config.yaml cannot be used (a reason); give this user",
                1,
                (0, PATIENCE_S),
            )
            for number in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\n"),
            "error: rank {rank}: out of memory ([enforce fail]",
            1,
            (0, 0),
        ),
        (
            RuntimeError("[device.cc:84] ifa != nullptr. Unable to find address for: eth9"),
            "error: GLOO_SOCKET_IFNAME=None is not a network interface with an address here; unset",
            2,
            (0, PATIENCE_S),
        ),
        (OSError(2, "No such file"), None, None, (0, 0)),
        (RuntimeError("NCCL error"), None, None, (PATIENCE_S, PATIENCE_S)),
        (ValueError("a mistake of ours"), None, None, (0, 0)),
    ],
)
def test_who_says_what(monkeypatch, error, begins, code, patience):
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        ending = explain(error)
        assert (ending.line is None) == (begins is None)
        if ending.line is not None:
            assert ending.line.startswith(begins.format(rank=rank))
            assert "\n" not in ending.line
        assert (ending.exit_code, ending.patience_s) == (code, patience[rank])


def test_a_stop_is_said_by_the_first_rank_alone(monkeypatch):
    assert explain(Preempted("stopped")) == ("stopped", 75, 0)
    monkeypatch.setenv("RANK", "1")
    assert explain(Preempted("stopped")) == (None, 75, 0)


def test_a_stop_file_that_can_never_be_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TRAIN_STOP_FILE", str(tmp_path / "nowhere" / "stop"))
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere; make it, or unset"):
        refuse_while_stopped()
    monkeypatch.setenv("TRAIN_STOP_FILE", str(tmp_path / "stop"))
    refuse_while_stopped()
    (tmp_path / "stop").touch()
    with pytest.raises(Preempted):
        refuse_while_stopped()
