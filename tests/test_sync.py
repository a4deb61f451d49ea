"""Offline runs uploaded with the real `wandb sync`, to a stand-in for W&B's server."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError

from tests.support import ctrl_c
from tests.support.fake_wandb import FakeWandb, fake_wandb
from tests.train.test_tracking import records
from train.config import load
from train.metrics.tracking import Tracker


def record(folder: Path, steps: range, resumed: bool = False, finish: bool = True) -> Tracker:
    """One start of a run, recorded offline."""
    folder.mkdir(exist_ok=True)
    overrides = [f"run.name={folder.name}", f"run.dir={folder.parent}", "tracking.mode=offline"]
    tracker = Tracker(load("configs/demo_cpu.yaml", overrides), folder, resumed=resumed)
    for step in steps:
        tracker.log({"progress/step": step, "loss/train": 10.0 - step}, step=step)
    if finish:
        tracker.finish()
        # W&B's own process may write the end a little later.
        newest = max(folder.glob("wandb/offline-run-*/*.wandb"))
        deadline = time.monotonic() + 30
        while not is_whole(newest):
            assert time.monotonic() < deadline, f"{newest} has no end"
            time.sleep(0.1)
    return tracker


def is_whole(file: Path) -> bool:
    try:
        return any(entry.HasField("exit") for entry in records(file))
    except (DecodeError, struct.error):
        return False  # half a record at the end


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`requeued` was started twice, the second time from step 8; `other` once, in between."""
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "requeued", range(1, 9))
    time.sleep(1.1)  # W&B names a piece by the second
    record(folder / "other", range(1, 4))
    time.sleep(1.1)
    record(folder / "requeued", range(9, 13), resumed=True)
    return folder


@pytest.fixture
def runs(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


@pytest.fixture
def server() -> Iterator[tuple[FakeWandb, str]]:
    with fake_wandb() as (fake, url):
        yield fake, url


def sync(url: str, *arguments: object, key: str = "0" * 40) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WANDB_API_KEY": key, "WANDB_BASE_URL": url}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment.pop("WANDB_MODE", None)
    command = ["bash", "scripts/sync.sh", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def steps(fake: FakeWandb, runs: Path, name: str) -> list[int]:
    """The steps that the server has of a run, in the order in which they came."""
    return [row["_step"] for row in fake.history.get((runs / name / "wandb_id").read_text(), [])]


@pytest.mark.slow
def test_once_in_order_and_as_one_run(runs: Path, server: tuple[FakeWandb, str]) -> None:
    fake, url = server
    done = sync(url, runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("3 sent, 0 already there, 0 waiting, 0 failed\n")
    assert len(fake.runs) == 2
    assert steps(fake, runs, "requeued") == list(range(1, 13))
    assert steps(fake, runs, "other") == [1, 2, 3]
    run = fake.runs[(runs / "requeued" / "wandb_id").read_text()]
    assert (run["groupName"], run["jobType"], run["displayName"]) == (
        "demo_cpu",
        "bf16",
        "requeued",
    )

    # Again: nothing is sent. A third start of the run: only that.
    asked = len(fake.requests)
    assert sync(url, runs).stdout == "0 sent, 3 already there, 0 waiting, 0 failed\n"
    assert len(fake.requests) == asked
    record(runs / "requeued", range(13, 15), resumed=True)
    assert sync(url, runs / "requeued").returncode == 0
    assert steps(fake, runs, "requeued") == list(range(1, 15))


@pytest.mark.slow
def test_goes_on_after_a_break(runs: Path, server: tuple[FakeWandb, str]) -> None:
    fake, url = server
    fake.refuse_history_of = {(runs / "requeued" / "wandb_id").read_text()}
    done = sync(url, runs)
    assert done.returncode == 1
    assert done.stdout.endswith("1 sent, 0 already there, 1 waiting, 1 failed\n")
    assert "Fatal error while uploading" in done.stderr
    assert done.stderr.count("\n") == 1
    assert steps(fake, runs, "other") == [1, 2, 3]
    assert steps(fake, runs, "requeued") == []

    fake.refuse_history_of = set()
    done = sync(url, runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("2 sent, 1 already there, 0 waiting, 0 failed\n")
    assert steps(fake, runs, "requeued") == list(range(1, 13))
    assert steps(fake, runs, "other") == [1, 2, 3]


def test_without_a_usable_key_nothing_is_marked(runs: Path, server: tuple[FakeWandb, str]) -> None:
    fake, url = server
    done = sync(url, runs, key="short")
    assert done.returncode == 1
    assert done.stdout == "0 sent, 0 already there, 1 waiting, 2 failed\n"
    assert done.stderr.count("\n") == 2
    assert fake.requests == []
    assert not list(runs.glob("**/*.synced"))


def test_without_a_key_that_is_said(
    runs: Path, tmp_path: Path, server: tuple[FakeWandb, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, url = server
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    for netrc in (None, "machine elsewhere login user password x"):
        if netrc:
            (tmp_path / ".netrc").write_text(netrc)
        done = sync(url, runs, key="")
        assert done.returncode == 2
        assert done.stderr == ("sync: no API key for W&B; run `wandb login` or set WANDB_API_KEY\n")
    # Where a key seems to be there, W&B says it, in a log of many lines.
    (tmp_path / ".netrc").write_text("# machine 127.0.0.1 is not ours")
    done = sync(url, runs, key="")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no API key for W&B" in done.stderr
    assert fake.runs == {}


def test_without_a_network_that_is_said_at_once(runs: Path) -> None:
    begin = time.monotonic()
    done = sync("http://127.0.0.1:9", runs)
    assert time.monotonic() - begin < 15
    assert done.returncode == 1
    assert done.stderr.startswith("sync: http://127.0.0.1:9 cannot be reached from here; nothing")
    assert done.stderr.count("\n") == 1
    assert not list(runs.glob("**/*.synced"))


def test_what_takes_long_is_said(
    runs: Path, tmp_path: Path, server: tuple[FakeWandb, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's own command tries for minutes where nobody answers any more."""
    _, url = server
    (tmp_path / "wandb").write_text("#!/bin/sh\necho setting up run x\nsleep 2\n")
    (tmp_path / "wandb").chmod(0o755)
    script = Path("scripts/sync.sh").read_text().replace("SAY_EVERY_S=10", "SAY_EVERY_S=1")
    (tmp_path / "sync.sh").write_text(script)
    environment = {**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command = ["bash", str(tmp_path / "sync.sh"), str(runs / "other")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "still sending: setting up run x" in done.stdout
    assert done.returncode == 1


def test_a_growing_record_waits(tmp_path: Path, server: tuple[FakeWandb, str]) -> None:
    fake, url = server
    tracker = record(tmp_path / "live", range(1, 4), finish=False)
    try:
        done = sync(url, tmp_path)
        assert done.stdout.endswith("0 sent, 0 already there, 1 waiting, 0 failed\n")
        assert "not finished yet" in done.stdout
        assert fake.runs == {}
        tracker.log({"loss/train": 1.0}, step=4)
    finally:
        tracker.finish()
    assert sync(url, tmp_path).returncode == 0
    assert steps(fake, tmp_path, "live") == [1, 2, 3, 4]


def test_a_killed_job_s_piece_is_sent(runs: Path, server: tuple[FakeWandb, str]) -> None:
    """Neither piece says that it has finished: the older cannot grow, and --all takes the newer."""
    fake, url = server
    for mark in runs.glob("requeued/wandb/*/finished"):
        mark.unlink()
    done = sync(url, runs / "requeued")
    assert done.stdout.endswith("1 sent, 0 already there, 1 waiting, 0 failed\n")
    assert steps(fake, runs, "requeued") == list(range(1, 9))
    assert sync(url, "--all", runs / "requeued").returncode == 0
    assert steps(fake, runs, "requeued") == list(range(1, 13))


def test_a_record_cut_short_is_sent_once(tmp_path: Path, server: tuple[FakeWandb, str]) -> None:
    """A kill leaves half a row at the end; what is before it counts."""
    fake, url = server
    record(tmp_path / "killed", range(1, 301))
    (piece,) = tmp_path.glob("killed/wandb/offline-run-*/*.wandb")
    piece.write_bytes(piece.read_bytes()[: piece.stat().st_size * 2 // 3])
    done = sync(url, tmp_path)
    assert done.returncode == 0, done.stderr
    arrived = steps(fake, tmp_path, "killed")
    assert 50 < len(arrived) < 300
    assert arrived == list(range(1, len(arrived) + 1))
    assert sync(url, tmp_path).stdout.startswith("0 sent, 1 already there")
    assert steps(fake, tmp_path, "killed") == arrived


def test_links_and_folders_however_they_are_written(
    runs: Path, tmp_path: Path, server: tuple[FakeWandb, str]
) -> None:
    _, url = server
    shutil.move(runs / "other", tmp_path / "disk 2")
    (runs / "other").symlink_to(tmp_path / "disk 2")  # a run on another disk
    link = tmp_path / "link"
    link.symlink_to(runs)  # all runs are on another disk
    (first, _) = sorted(runs.glob("requeued/wandb/offline-run-*"))
    done = sync(url, f"{first}/")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("1 sent, 0 already there, 0 waiting, 0 failed\n")
    done = sync(url, link)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("2 sent, 1 already there, 0 waiting, 0 failed\n")


def sending(runs: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """A sync of a piece in a group of its own, with a `wandb` that does not end."""
    stand_in = tmp_path / "bin" / "wandb"
    stand_in.parent.mkdir()
    pid = tmp_path / "pid"
    stand_in.write_text(f"#!/bin/sh\necho $$ >{pid}.new\nmv {pid}.new {pid}\nexec sleep 60\n")
    stand_in.chmod(0o755)
    (first, _) = sorted(runs.glob("requeued/wandb/offline-run-*"))
    environment = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    environment["HTTPS_PROXY"] = "http://127.0.0.1:9"  # so that it is not asked whether it is there
    process = subprocess.Popen(
        ["bash", "scripts/sync.sh", str(first)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=ctrl_c.heard,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not pid.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_ends_the_upload_too(runs: Path, tmp_path: Path) -> None:
    process = sending(runs, tmp_path)
    upload = int((tmp_path / "pid").read_text())
    assert is_running(upload)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    deadline = time.monotonic() + 10
    while is_running(upload):
        assert time.monotonic() < deadline, "it continues to send"
        time.sleep(0.05)


def test_two_at_once_send_a_piece_once(
    runs: Path, tmp_path: Path, server: tuple[FakeWandb, str]
) -> None:
    fake, url = server
    process = sending(runs, tmp_path)
    (first, _) = sorted(runs.glob("requeued/wandb/offline-run-*"))
    try:
        done = sync(url, first)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)
    assert done.returncode == 0, done.stderr
    assert "another sync is sending it" in done.stdout
    assert done.stdout.endswith("0 sent, 0 already there, 1 waiting, 0 failed\n")
    assert not fake.runs
    assert sync(url, first).stdout.endswith("1 sent, 0 already there, 0 waiting, 0 failed\n")


def test_missing_folder_is_one_line(tmp_path: Path) -> None:
    done = sync("http://127.0.0.1:9", tmp_path / "none")
    assert (done.returncode, done.stderr) == (2, f"sync: no folder {tmp_path / 'none'}\n")
