"""No process of a benchmark is left behind, whatever ends it and whenever; and why it ended."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.bench.measure import __main__ as measuring
from scripts.bench.measure import waiting
from scripts.bench.measure.__main__ import main
from scripts.bench.stacks.spec import config_of, parse
from scripts.bench.train import process
from scripts.bench.train.process import Process, Task
from tests.support.tiny import TINY_MODEL as TINY
from train.config import ConfigError

STARTS_AND_HANGS = """
import time
from tests.bench.test_process import start
waits = start()
print("started", flush=True), time.sleep(600)
"""


def start(minutes: float = 6, sizes: tuple[int, ...] = (2,)) -> Process:
    """One that waits, of two ranks."""
    spec = parse("bf16")
    config = config_of(spec, TINY[0], TINY[1:], "balanced", 2)
    arguments = Namespace(process_minutes=minutes, gpus=2, config=TINY[0], overrides=TINY[1:])
    return Process(Task(spec, "balanced", config, sizes, 1, 1), arguments)


def those_of(folder: Path) -> list[int]:
    """The processes that were started with temporary files in `folder`."""
    found = []
    for one in Path("/proc").glob("[0-9]*"):
        try:
            of_it = str(folder).encode() in (one / "cmdline").read_bytes()
            if of_it and "State:\tZ" not in (one / "status").read_text():
                found.append(int(one.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def wait_until(number: int, folder: Path) -> None:
    """Until there are this many processes: torchrun and its two ranks, or none."""
    for _ in range(600):
        if len(those_of(folder)) == number:
            return
        time.sleep(0.1)
    raise AssertionError(f"{those_of(folder)} are there, not {number}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_ranks_of_one_that_waits_end_with_it(tmp_path, monkeypatch, capfd):
    """Also while they load their libraries: then they do not know yet whose ranks they are."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one = start()
    try:
        wait_until(3, tmp_path)
        one.end()
        wait_until(0, tmp_path)
        assert not list(tmp_path.glob("*")), "its folder is left"
        one.end()  # a second time does nothing
        assert "Traceback" not in capfd.readouterr().err
    finally:
        for left in those_of(tmp_path):
            os.kill(left, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("without_torchrun", [False, True])
def test_they_end_with_a_benchmark_that_is_killed(tmp_path, without_torchrun):
    """Also where torchrun leaves them behind, as one does that is stopped while it starts them."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", STARTS_AND_HANGS]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as one:
        try:
            assert one.stdout is not None
            assert one.stdout.readline() == "started\n"
            wait_until(3, tmp_path)
            if without_torchrun:
                (torchrun,) = (pid for pid in those_of(tmp_path) if parent_of(pid) == one.pid)
                os.kill(torchrun, signal.SIGKILL)
            one.kill()
            wait_until(0, tmp_path)
        finally:
            one.kill()
            for left in those_of(tmp_path):
                os.kill(left, signal.SIGKILL)


@pytest.mark.slow
def test_a_rank_that_fails_alone_says_why_and_the_others_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(process, "MEASURE", "tests.support.failing_stack")
    monkeypatch.setattr(process, "GRACE_S", 1.0)
    begin = time.monotonic()
    one = start(minutes=3)
    try:
        report, ended = one.measure()
    finally:
        one.end()
    assert time.monotonic() - begin < 120
    assert ended == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 TiB"
    assert not report["results"]


@pytest.mark.slow
@pytest.mark.parametrize("patience", [90.0, 1.0])
def test_no_step_is_timed_while_one_that_was_started_ahead_loads(monkeypatch, patience):
    """But not forever: one that hangs would else make the other fail."""
    monkeypatch.setattr(process, "LOADING_S", patience)
    one = start()
    asked, timed_too_early = 0, False

    def is_loaded() -> bool:
        nonlocal asked, timed_too_early
        asked += 1
        timed_too_early |= one._out.exists()
        return asked > 25

    ahead: Any = SimpleNamespace(is_loaded=is_loaded)
    try:
        report, _ = one.measure(ahead)
    finally:
        one.end()
    assert len(report["results"]) == 1
    assert not timed_too_early
    assert (asked > 25) == (patience > 25)


def test_all_ranks_have_loaded_or_the_process_has_ended(tmp_path, monkeypatch):
    one = Process.__new__(Process)
    one._folder, one._ranks = tmp_path, 2
    polls: Any = SimpleNamespace(poll=lambda: None)
    one._process = polls
    for rank in range(2):
        assert not one.is_loaded()
        monkeypatch.setenv("RANK", str(rank))
        waiting.say_loaded(tmp_path)
    assert one.is_loaded()
    one._folder = tmp_path / "another"
    assert not one.is_loaded()
    polls.poll = lambda: 1
    assert one.is_loaded(), "who waits for it would wait for nothing"


def test_a_rank_says_that_it_has_loaded_once_it_has(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(measuring, "_load_libraries", lambda spec: said.append("loads"))
    monkeypatch.setattr(waiting, "say_loaded", lambda folder: said.append(folder))

    def wait_for(file: Path) -> None:
        raise ConfigError(f"{file}")

    monkeypatch.setattr(waiting, "wait_for", wait_for)
    out = ["--out", str(tmp_path / "one.json"), "--wait-for", str(tmp_path / "go")]
    assert main([TINY[0], "bf16", *TINY[1:], "parallel.expert_parallel=1", *out]) == 2
    assert said == ["loads", tmp_path]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [False, True])
def test_a_folder_that_is_removed_ends_one_process_and_not_the_benchmark(asked):
    ahead: Any = SimpleNamespace(is_loaded=lambda: False)
    one = start()
    try:
        if not asked:
            shutil.rmtree(one._folder)
        else:
            threading.Timer(3, lambda: shutil.rmtree(one._folder)).start()
        report, ended = one.measure(ahead)
    finally:
        one.end()
    assert report == {"results": []}
    assert ended.startswith("process ended: exit code ")


@pytest.mark.slow
def test_one_that_cannot_end_is_not_waited_for(monkeypatch, capsys):
    """Once it has measured at all sizes: NCCL waits forever for a CUDA graph that is still held."""
    monkeypatch.setattr(process, "MEASURE", "tests.support.lingering_stack")
    monkeypatch.setattr(process, "ENDING_S", 1.0)
    begin = time.monotonic()
    one = start(minutes=3, sizes=(1, 2))
    try:
        report, ended = one.measure()
    finally:
        one.end()
    assert time.monotonic() - begin < 120
    assert report == {"results": [{"micro_batch": 1}, {"micro_batch": 2}]}
    assert "all was measured" in ended
    assert "bf16: ended: all was measured" in capsys.readouterr().out


def test_who_would_ask_has_ended(tmp_path):
    holds = "import sys, time, pathlib; from scripts.bench.measure import waiting; "
    holds += "lock = waiting.hold(pathlib.Path(sys.argv[1])); print('holds', flush=True); "
    command = [sys.executable, "-c", holds + "time.sleep(600)", str(tmp_path)]
    with (
        ThreadPoolExecutor(1) as pool,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder,
    ):
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "holds\n"
            waits = pool.submit(waiting.wait_for, tmp_path / "go")
            time.sleep(0.3)
            assert waits.running()
        finally:
            holder.kill()
        with pytest.raises(ConfigError, match="the benchmark that would write it has ended"):
            waits.result(60)
    (tmp_path / "go").touch()
    with pytest.raises(ConfigError, match="has ended"):  # too late
        waiting.wait_for(tmp_path / "go")
    (tmp_path / waiting.LOCK).unlink()
    waiting.wait_for(tmp_path / "go")  # written by hand


def test_what_is_waited_for_needs_a_folder(tmp_path, capsys):
    gone = tmp_path / "gone" / "go"
    out = ["--out", str(tmp_path / "one.json"), "--wait-for", str(gone)]
    assert main([TINY[0], "bf16", *TINY[1:], "parallel.expert_parallel=1", *out]) == 2
    assert f"error: --wait-for {gone}: there is no folder" in capsys.readouterr().err
