"""Where one process of a job ends, the others end within seconds, whatever they wait for."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.ranks import Training
from tests.support.tiny import argv, checkpoints, repeated

LONG = "train.steps=2000"


def rank_1_ends(how: str, with_the_lock: bool):
    """Rank 1 ends in step 3, for which rank 0 waits as NCCL does: nothing tells it."""

    def plant(rank: int) -> None:
        from train import loop

        step = loop.step

        def stepped(training, *args):
            if training.done == 2 and rank == 1:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("the planted failure of rank 1")
            while training.done == 2 and not with_the_lock:
                time.sleep(0.01)
            if training.done == 2:
                ctypes.PyDLL(None).sleep(300)
            return step(training, *args)

        loop.step = stepped

    return plant


@pytest.mark.parametrize("how", ["killed", "raises"])
@pytest.mark.parametrize("with_the_lock", [False, True])
def test_a_rank_that_spins_ends_with_the_one_that_failed(tmp_path, how, with_the_lock):
    keys = argv(tmp_path, "a", LONG)
    with Training(2, keys, tmp_path / "log", rank_1_ends(how, with_the_lock)) as training:
        training.processes[1].join(60)
        begin = time.monotonic()
        codes = training.exit_codes(20)
        seconds = time.monotonic() - begin
    assert codes[1] == (-signal.SIGKILL if how == "killed" else 1)
    assert codes[0] == (-signal.SIGALRM if with_the_lock else 1)
    assert seconds < 5
    log = training.log.read_text()
    if with_the_lock:
        assert " in stepped" in log, "its stack"
    else:
        assert log.count("error: rank 0 lost another rank (rank 1); its own error line") == 1


@pytest.mark.slow
def test_torchrun_ends_a_job_in_which_a_rank_fails(tmp_path, monkeypatch):
    """Its own patience with the others is 30 s."""
    monkeypatch.setenv("PLANNED", "spin")
    monkeypatch.setenv("FAILED_AT", str(tmp_path / "failed_at"))
    done = subprocess.run(torchrun("tests.support.failing_rank", tmp_path), capture_output=True)
    ended = time.time()
    assert done.returncode == 1
    assert ended - float((tmp_path / "failed_at").read_text()) < 8
    assert b"the planted failure of rank 1" in done.stderr


def torchrun(module: str, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*command, "-m", module, *argv(folder, "a", LONG, "data.workers=1")]


def test_ranks_save_and_end_when_torchrun_is_killed(tmp_path):
    process = subprocess.Popen(
        torchrun("train", tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        metrics = tmp_path / "a" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, 120)
        children = every_child(process.pid)
        assert len(children) >= 4, "ranks and data workers"
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(lives, children)), 30)
    finally:
        process.kill()
    (saved,) = checkpoints(tmp_path / "a")
    assert max(repeated(tmp_path / "a")) == saved


def every_child(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        children = ""
        with suppress(FileNotFoundError):  # a thread may end meanwhile
            children = (task / "children").read_text()
        for child in map(int, children.split()):
            found += [child, *every_child(child)]
    return found


def lives(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def wait_until(what, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, f"not in {timeout} s"
        time.sleep(0.05)


def test_data_workers_end_with_a_killed_rank(tmp_path):
    """They would hold its connections open, by whose end the other rank notices."""
    with Training(2, argv(tmp_path, "a", LONG, "data.workers=1"), tmp_path / "log") as training:
        training.wait_until(lambda: (tmp_path / "a" / "metrics.jsonl").exists())
        training.wait_until(lambda: repeated(tmp_path / "a"))
        victim = training.processes[1].pid
        assert victim
        children = every_child(victim)
        training.signal(1, signal.SIGKILL)
        wait_until(lambda: not any(map(lives, children)), 2)
        training.exit_codes()


SLOW_WORKER = """
import time
from train import __main__ as entry
from train.data import batches

make, made = batches.make_batch, [0]

def slow(rows, eod):
    made[0] += 1
    if made[0] > 3 * 4:  # three steps of four micro-batches
        time.sleep(300)
    return make(rows, eod)

batches.make_batch = slow
entry.run()
"""


def test_a_finished_training_does_not_wait_for_what_a_worker_reads(tmp_path):
    """One that reads for minutes ends at once, though it ignores the signals of a job. In a real
    process, since Python waits for its children at the very end."""
    keys = argv(tmp_path, "a", "train.steps=3", "data.workers=1", "parallel.expert_parallel=1")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WORKER, *keys], stdout=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: checkpoints(tmp_path / "a"), 120)
        children = every_child(process.pid)
        begin = time.monotonic()
        assert process.wait(30) == 0
        assert time.monotonic() - begin < 4
    finally:
        process.kill()
    assert not any(map(lives, children))
    assert process.stdout
    assert "done in" in process.stdout.read()
