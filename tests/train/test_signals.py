"""Signals: the step is ended, saved, and the exit code says that the same command continues."""

import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.ranks import Training, read_metrics, run_train
from tests.support.tiny import argv, checkpoints, repeated, slow_saves
from train.checkpoint.writer import Writer
from train.safety.signals import StopRequest

STEPS = "train.steps=400"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The first steps of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with Training(2, argv(folder, "a", STEPS, "data.workers=1"), folder / "log") as training:
        training.wait_until(lambda: logged(folder / "a") >= 40)
    return repeated(folder / "a")


def logged(run_dir: Path) -> int:
    """The last step in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return text.count("\n")


def heard(rank: int) -> None:
    """As in a terminal: under nohup, or behind `&` in a script, the tests have these ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGXCPU"])
def test_a_signal_to_one_rank_saves_and_says_requeue_me(tmp_path, whole, name):
    keys = argv(tmp_path, "a", STEPS, "data.workers=1")
    with Training(2, keys, tmp_path / "log", heard) as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= 2)
        training.signal(1, signal.Signals[name])
        assert training.exit_codes() == [75, 75]
    (saved,) = checkpoints(tmp_path / "a")
    log = training.log.read_text()
    assert "Traceback" not in log
    said = f"after step {saved} of 400, which is saved; the same command resumes from there"
    assert log.count(f"stopped by {name} {said}") == log.count("stopped by") == 1
    rows = repeated(tmp_path / "a")
    assert max(rows) == saved, "a step was trained and not saved"
    assert rows == {step: whole[step] for step in rows}

    with Training(2, keys, tmp_path / "log") as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= saved + 2)
    assert f"start     step {saved} of 400, from" in training.log.read_text()
    rows = {step: row for step, row in repeated(tmp_path / "a").items() if step <= max(whole)}
    assert rows == {step: whole[step] for step in rows}
    assert len(rows) >= saved + 2


def test_nohup_means_it(tmp_path):
    """It has the run ignore SIGHUP before it begins."""

    def nohup(rank: int) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with Training(2, argv(tmp_path, "a", STEPS), tmp_path / "log", nohup) as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= 2)
        for rank in (0, 1):
            training.signal(rank, signal.SIGHUP)
        step = logged(tmp_path / "a")
        training.wait_until(lambda: logged(tmp_path / "a") >= step + 3)


def test_ctrl_c_before_the_first_step_is_no_traceback(tmp_path):
    def slow_start(rank: int) -> None:
        from train import loop

        heard(rank)
        loop.build = lambda *_: time.sleep(60)  # type: ignore[assignment]
        (tmp_path / f"rank {rank}").touch()

    with Training(2, argv(tmp_path, "a", STEPS), tmp_path / "log", slow_start) as training:
        training.wait_until(lambda: len(list(tmp_path.glob("rank *"))) == 2)
        time.sleep(2)
        for rank in (0, 1):
            training.signal(rank, signal.SIGINT)
        assert training.exit_codes(20) == [-signal.SIGINT] * 2
    assert "Traceback" not in training.log.read_text()


def test_a_second_signal_exits_at_once(tmp_path):
    with Training(2, argv(tmp_path, "a", STEPS), tmp_path / "log", slow_save) as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= 2)
        training.signal(0, signal.SIGTERM)
        time.sleep(1.2)  # closer together they are one request
        begin = time.monotonic()
        training.signal(0, signal.SIGTERM)
        training.processes[0].join(5)
        assert training.processes[0].exitcode == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 2
    assert "a second signal, SIGTERM: leaving at once" in training.log.read_text()
    assert checkpoints(tmp_path / "a") == []


def slow_save(rank: int) -> None:
    slow_saves(30)


def test_a_limit_on_cpu_time(tmp_path):
    """`ulimit -S -t`: the system says so again after every second of it, and that is not a second
    request."""

    def busy_save(rank: int) -> None:
        write = Writer.write_data

        def slow(self, plan, planner):
            end = time.process_time() + 2.5
            while time.process_time() < end:
                pass
            return write(self, plan, planner)

        Writer.write_data = slow  # type: ignore[method-assign]

    keys = argv(tmp_path, "a", STEPS, "parallel.expert_parallel=1")
    with Training(1, keys, tmp_path / "log", busy_save) as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= 2)
        pid = training.processes[0].pid
        assert pid
        resource.prlimit(pid, resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))
        assert training.exit_codes() == [75]
    (saved,) = checkpoints(tmp_path / "a")
    assert f"stopped by SIGXCPU after step {saved} of 400" in training.log.read_text()


def test_two_signals_close_together_are_one(tmp_path):
    """As where a batch system signals all processes, and torchrun passes on its own."""
    with Training(2, argv(tmp_path, "a", STEPS), tmp_path / "log") as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= 2)
        for rank in (0, 1, 0, 1):
            training.signal(rank, signal.SIGTERM)
        assert training.exit_codes() == [75, 75]
    assert len(checkpoints(tmp_path / "a")) == 1


def test_the_stop_file_asks_and_answers(tmp_path, monkeypatch):
    file = tmp_path / "stop"
    monkeypatch.setenv("TRAIN_STOP_FILE", str(file))
    keys = argv(tmp_path, "a", STEPS)
    with Training(2, keys, tmp_path / "log") as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= 2)
        file.touch()
        assert training.exit_codes() == [75, 75]
    assert file.read_text() == "saved\n"
    (saved,) = checkpoints(tmp_path / "a")

    # torchrun --max-restarts would start it again.
    begin = time.monotonic()
    assert run_train(1, keys) == [75]
    assert time.monotonic() - begin < 5
    assert checkpoints(tmp_path / "a") == [saved]

    file.unlink()
    with Training(2, keys, tmp_path / "log") as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= saved + 1)
        training.signal(1, signal.SIGTERM)
        assert training.exit_codes() == [75, 75]
    assert file.read_text() == "saved\n", "what starts torchrun does not see 75"


def test_what_cannot_be_saved_is_not_called_saved(tmp_path, monkeypatch):
    """A batch script must not requeue what fails in the same way each time."""
    file = tmp_path / "stop"
    monkeypatch.setenv("TRAIN_STOP_FILE", str(file))

    def full_disk(rank: int) -> None:
        from train.checkpoint import checksums

        def fail(*_):
            raise OSError(28, "No space left on device")

        checksums.write = fail

    with Training(
        1, argv(tmp_path, "a", STEPS, "parallel.expert_parallel=1"), tmp_path / "log", full_disk
    ) as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= 2)
        file.touch()
        assert training.exit_codes() == [1]
    assert "could not be saved" in training.log.read_text()
    assert file.read_text() == ""


def test_no_rank_leaves_while_the_first_one_closes_wandb(tmp_path):
    """torchrun ends the others as soon as one has ended."""
    ends = tmp_path / "ends"
    ends.mkdir()

    def slow_upload(rank: int) -> None:
        from train.metrics.tracking import Tracker
        from train.safety.guards import Safety

        finish, stop = Tracker.finish, Safety.__exit__

        def slow(self, *args):
            time.sleep(2)
            finish(self, *args)
            (ends / "upload").write_text(str(time.monotonic()))

        def leave(self, *error):
            (ends / f"rank {rank}").write_text(str(time.monotonic()))
            stop(self, *error)

        Tracker.finish, Safety.__exit__ = slow, leave  # type: ignore[method-assign]

    with Training(2, argv(tmp_path, "a", STEPS), tmp_path / "log", slow_upload) as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= 2)
        training.signal(1, signal.SIGTERM)
        assert training.exit_codes() == [75, 75]
    uploaded, *left = (float((ends / name).read_text()) for name in ("upload", "rank 0", "rank 1"))
    assert min(left) >= uploaded
    assert "stopped by SIGTERM" in training.log.read_text()


def test_the_last_step_is_a_normal_end(tmp_path):
    def stop_in_the_last_step(rank: int) -> None:
        from train import loop

        step = loop.step

        def signalled(training, *args):
            if rank == 1 and training.done == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(training, *args)

        loop.step = signalled

    keys = argv(tmp_path, "a", "train.steps=3")
    with Training(2, keys, tmp_path / "log", stop_in_the_last_step) as training:
        codes = training.exit_codes()
    assert codes == [0, 0], training.log.read_text()
    assert checkpoints(tmp_path / "a") == [3]
    assert len(read_metrics(tmp_path / "a")) == 3


def test_a_stop_file_that_cannot_be_written_is_said(tmp_path, caplog):
    """All is saved by then, and the exit code says so."""
    request: Any = SimpleNamespace(file=tmp_path / "gone" / "stop")
    StopRequest.answer(request)
    assert "stop cannot be written (No such file or directory)" in caplog.text
