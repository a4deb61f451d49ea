"""A log that fails: training continues, saves, and ends as it would have."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path

import pytest

from tests.support.faults import hang, hang_with_the_lock
from tests.support.ranks import Training
from tests.support.tiny import argv, checkpoints, repeated, slow_saves
from train.safety import output


def nobody_reads() -> None:
    """A pipe whose reader is gone, as of `| head`, or of `| tee` after Ctrl-C."""
    read, write = os.pipe()
    os.close(read)
    point_at(write)


def disk_is_full() -> None:
    point_at(os.open("/dev/full", os.O_WRONLY))


def reader_sleeps() -> None:
    """A pipe that is full and stays so, as of a stopped `less`."""
    _, write = os.pipe()
    fcntl(write, F_SETPIPE_SZ, 4096)
    os.write(write, b"x" * 4096)
    point_at(write)


def closed() -> None:
    """As started with `>&- 2>&-`."""
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = None  # type: ignore[assignment]


def point_at(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


LOGS = pytest.mark.parametrize("log", [nobody_reads, disk_is_full, reader_sleeps, closed])


def later(log: Callable[[], None], step: int) -> Callable[[int], None]:
    """The log goes away in the middle; before the start if `step` is 0."""

    def plant(rank: int) -> None:
        from train import loop

        real = loop.step

        def stepped(training, *args):
            if training.done == step - 1:
                log()
            return real(training, *args)

        if step:
            loop.step = stepped
        else:
            log()

    return plant


@LOGS
def test_a_training_ends_well_without_its_log(tmp_path, log):
    keys = argv(tmp_path, "a", "train.steps=4", "data.workers=1")
    with Training(2, keys, tmp_path / "log", later(log, 0)) as training:
        assert training.exit_codes() == [0, 0]
    assert checkpoints(tmp_path / "a") == [4]
    assert sorted(repeated(tmp_path / "a")) == [1, 2, 3, 4]


@LOGS
def test_a_signal_saves_without_a_log(tmp_path, log):
    """Ctrl-C ends `tee` too, and the next print meets a pipe without a reader."""
    keys = argv(tmp_path, "a", "train.steps=2000")
    with Training(2, keys, tmp_path / "log", later(log, 0 if log is closed else 2)) as training:
        training.wait_until(lambda: len(rows(tmp_path / "a")) >= 3)
        training.signal(1, signal.SIGINT)
        assert training.exit_codes() == [75, 75]
    (saved,) = checkpoints(tmp_path / "a")
    assert len(rows(tmp_path / "a")) == saved


def rows(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("log", [disk_is_full, reader_sleeps])
def test_a_second_signal_exits_at_once_without_a_log(tmp_path, log):
    def plant(rank: int) -> None:
        slow_saves(30)
        later(log, 2)(rank)

    keys = argv(tmp_path, "a", "train.steps=2000")
    with Training(2, keys, tmp_path / "log", plant) as training:
        training.wait_until(lambda: len(rows(tmp_path / "a")) >= 3)
        training.signal(0, signal.SIGTERM)
        time.sleep(1.2)  # closer together they are one request
        training.signal(0, signal.SIGTERM)
        training.processes[0].join(5)
        assert training.processes[0].exitcode == 128 + signal.SIGTERM


@pytest.mark.parametrize("log", [disk_is_full, reader_sleeps])
def test_a_hang_is_ended_without_a_log(tmp_path, log):
    def plant(rank: int) -> None:
        hang(rank)
        log()

    keys = argv(tmp_path, "a", "train.steps=2000", "parallel.timeout_s=3")
    with Training(2, keys, tmp_path / "log", plant) as training:
        assert training.exit_codes(40) == [1, 1]


def test_a_stack_that_nobody_reads_keeps_no_process(tmp_path):
    """SIGALRM's is written by C code, when no thread of Python's runs."""

    def plant(rank: int) -> None:
        from train.safety import watchdog

        watchdog.END_S = 4
        hang_with_the_lock({0})(rank)
        reader_sleeps()

    keys = argv(
        tmp_path, "a", "train.steps=9", "parallel.timeout_s=2", "parallel.expert_parallel=1"
    )
    with Training(1, keys, tmp_path / "log", plant) as training:
        assert training.exit_codes(30) == [-signal.SIGALRM]


@pytest.mark.parametrize("log", [nobody_reads, disk_is_full, closed])
def test_bad_input_has_its_exit_code_without_a_log(tmp_path, log):
    with Training(1, argv(tmp_path, "a", "moe.top_k=99"), tmp_path / "log", later(log, 0)) as one:
        assert one.exit_codes() == [2]


@pytest.mark.slow
def test_head(tmp_path):
    """A real process, whose reader has seen enough after the first line."""
    keys = argv(tmp_path, "a", "train.steps=4", "parallel.expert_parallel=1")
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *keys], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout
    assert process.stdout.readline().startswith(b"run ")
    process.stdout.close()
    assert process.wait(60) == 0
    assert checkpoints(tmp_path / "a") == [4]


def test_what_could_not_be_written_comes_later_in_order():
    read, write = os.pipe()
    fcntl(write, F_SETPIPE_SZ, 4096)
    outlet = output.Outlet(write)
    text = b"".join(b"line %d\n" % n for n in range(2000))
    assert outlet.write(text) == len(text)
    found = b""
    while len(found) < len(text):
        found += os.read(read, 4096)
        outlet.write(b"")
    assert found == text


def test_what_waits_is_not_written_twice_by_a_copy_of_the_process():
    """A data worker is one."""
    read, write = os.pipe()
    fcntl(write, F_SETPIPE_SZ, 4096)
    outlet = output.Outlet(write)
    outlet.write(b"x" * 5000)
    child = os.fork()
    if not child:
        os.read(read, 4096)
        outlet.write(b"")
        os._exit(0)
    os.waitpid(child, 0)
    os.set_blocking(read, False)
    with pytest.raises(BlockingIOError):
        os.read(read, 1)
    outlet.write(b"")
    assert os.read(read, 5000) == b"x" * 904
