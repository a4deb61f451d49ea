"""How a checkpoint gets on disk: what is copied, by which threads, what is printed."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import Training, run_train
from tests.support.tiny import argv, checkpoints, differences, repeated, slow_saves
from train.checkpoint import checksums, files, host_copy, progress, writer
from train.checkpoint.host_copy import HostCopy

ALONE = "parallel.expert_parallel=1"


def test_a_copy_is_of_the_moment(monkeypatch):
    """Whatever becomes of the state: changed before the copying is over, it waits."""
    copy_now = host_copy._copy

    def slowly(pairs: Any) -> None:
        time.sleep(0.3)
        copy_now(pairs)

    monkeypatch.setattr(host_copy, "_copy", slowly)
    copy = HostCopy(torch.device("cpu"))
    try:
        state: dict[str, Any] = {
            "a": torch.arange(6.0),
            "b": {"n": 3, "t": torch.tensor(1.0), "pair": (1, 2.0)},
        }
        first = copy.begin(state)
        copy.wait_before_update()
        state["a"].zero_()
        state["b"]["t"].fill_(9)
        got = first.result()
        assert torch.equal(got["a"], torch.arange(6.0))
        assert got["b"]["t"] == 1
        assert (got["b"]["n"], got["b"]["pair"]) == (3, (1, 2.0))
        state["b"]["n"] = 4
        second = copy.begin(state).result()
        assert second["b"]["n"] == 4
        assert torch.equal(second["a"], torch.zeros(6))
        assert second["a"].data_ptr() == got["a"].data_ptr(), "memory of its own each time"
    finally:
        copy.close()


def test_the_first_save_finds_its_memory(tmp_path):
    """It is there since the first step, which is why the first save stops nothing for long."""

    def ready(rank: int) -> None:
        begin = HostCopy.begin

        def ready_begin(self: HostCopy, state: Any) -> Any:
            assert self._copies is not None, "the first save gets its memory itself"
            before = self._copies.result()
            done = begin(self, state)
            assert self._copies.result() is before, "got again"
            return done

        HostCopy.begin = ready_begin  # type: ignore[method-assign]

    keys = argv(tmp_path, "a", ALONE, "train.steps=6", "checkpoint.every=2", "checkpoint.keep=9")
    with Training(1, keys, tmp_path / "log", ready) as training:
        assert training.exit_codes() == [0]
    assert checkpoints(tmp_path / "a") == [2, 4, 6]


def test_the_optimizer_waits_for_the_copy(tmp_path):
    """Copied and written so slowly that a step could be over before: what is saved is exact."""

    def slow_copy(rank: int) -> None:
        quick = host_copy._copy

        def slow(pairs: Any) -> None:
            time.sleep(0.5)
            quick(pairs)

        host_copy._copy = slow
        slow_saves(1)

    keys = argv(tmp_path, "a", ALONE, "train.steps=6", "checkpoint.every=3", "checkpoint.keep=9")
    with Training(1, keys, tmp_path / "log", slow_copy) as training:
        assert training.exit_codes() == [0]
    run_dir = tmp_path / "a"
    want = repeated(run_dir)
    assert checkpoints(run_dir) == [3, 6]
    files.delete(files.checkpoint_of(run_dir / "checkpoints", 6))
    assert run_train(1, keys) == [0]
    assert not differences(repeated(run_dir), want)


def many_files(rank: int) -> None:
    writer.BYTES_PER_FILE = 1 << 17
    checksums.threads = lambda most: min(most, 3)


def test_several_files_a_rank(tmp_path):
    """Written at once, and whole; a run resumes from them as from one."""
    keys = argv(tmp_path, "a", "train.steps=4", "checkpoint.every=2")
    with Training(2, keys, tmp_path / "log", many_files) as training:
        assert training.exit_codes() == [0, 0]
    run_dir = tmp_path / "a"
    newest = files.checkpoint_of(run_dir / "checkpoints", 4)
    want = {f"__{rank}_{n}.distcp" for rank in (0, 1) for n in (0, 1, 2)}
    assert {path.name for path in newest.glob("*.distcp")} == want
    assert checksums.damage(newest) is None
    whole = repeated(run_dir)
    files.delete(newest)
    assert run_train(2, keys) == [0, 0]  # by one file a rank again
    assert not differences(repeated(run_dir), whole)
    assert {path.name for path in newest.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_2.distcp", "rank_00001.pt", ".metadata.tmp"])
@pytest.mark.parametrize("opens", [True, False])
def test_an_error_of_any_thread_is_said(tmp_path, name, opens):
    """An error in PyTorch's threads is only printed."""

    def full_disk(rank: int) -> None:
        many_files(rank)
        quick_open, quick = Path.open, checksums.HashingStream.write

        def fails_to_open(self: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
            if self.name == name and "w" in mode:
                raise OSError(28, "No space left on device")
            return quick_open(self, mode, *more, **named)

        def fails_to_write(self: checksums.HashingStream, data: Any) -> int:
            if Path(self._file.name).name == name:
                raise OSError(28, "No space left on device")
            return quick(self, data)

        if opens:
            checksums.HashingStream.write = fails_to_write  # type: ignore[method-assign]
        else:
            Path.open = fails_to_open  # type: ignore[method-assign, assignment]

    keys = argv(tmp_path, "a", "train.steps=3", "checkpoint.every=2")
    with Training(2, keys, tmp_path / "log", full_disk) as training:
        assert training.exit_codes() == [1, 1]
    log = training.log.read_text()
    assert "Traceback" not in log
    assert re.search(r"WARNING: the checkpoint of step 2 was not saved \(rank \d: .*No space", log)
    assert "error: the checkpoint of step 3 could not be saved" in log
    assert list((tmp_path / "a" / "checkpoints").iterdir()) == []


def test_files_that_another_node_has_are_missed(tmp_path):
    """Where nodes do not share run.dir, the first one sees nothing of what the other writes."""

    def apart(rank: int) -> None:
        writer.VISIBLE_S = 0.2
        if rank == 1:
            quick = writer.Writer.write_data

            def elsewhere(self: writer.Writer, plan: Any, planner: Any) -> Any:
                self.path = self.folder = tmp_path / "of another node"
                self.folder.mkdir(exist_ok=True)
                return quick(self, plan, planner)

            writer.Writer.write_data = elsewhere  # type: ignore[method-assign]

    keys = argv(tmp_path, "a", "train.steps=3", "checkpoint.every=2")
    with Training(2, keys, tmp_path / "log", apart) as training:
        assert training.exit_codes() == [1, 1]
    log = training.log.read_text()
    assert "step 2 was not saved (rank 0: __1_0.distcp, which rank 1 has written, is not in" in log
    assert "run.dir must be a folder that all nodes share" in log
    assert checkpoints(tmp_path / "a") == []


def test_no_save_at_the_end(tmp_path):
    """`every` still counts, and a started save is on disk at the end."""
    keys = argv(tmp_path, "a", ALONE, "checkpoint.at_end=false")
    assert run_train(1, [*keys, "train.steps=3"]) == [0]
    assert checkpoints(tmp_path / "a") == []
    assert run_train(1, [*keys, "train.steps=5", "checkpoint.every=2"]) == [0]
    assert checkpoints(tmp_path / "a") == [2, 4]
    assert run_train(1, [*keys, "train.steps=6", "checkpoint.every=3"]) == [0]
    assert checkpoints(tmp_path / "a") == [4, 6]
    assert run_train(1, [*keys, "train.steps=7", "checkpoint.at_end=true"]) == [0]
    assert checkpoints(tmp_path / "a") == [6, 7]


def test_what_takes_long_is_said_by_the_first_rank(tmp_path):
    def slow(rank: int) -> None:
        progress.AFTER_S, progress.EVERY_S = 0.3, 0.3
        slow_saves(1)
        quick = checksums.damage

        def slow_check(*given: Any, **named: Any) -> str | None:
            time.sleep(1)
            return quick(*given, **named)

        checksums.damage = slow_check  # type: ignore[assignment]

    keys = argv(tmp_path, "a", "train.steps=2")
    for steps in (2, 3):
        with Training(2, [*keys, f"train.steps={steps}"], tmp_path / "log", slow) as training:
            assert training.exit_codes() == [0, 0]
        log = training.log.read_text()
        name = f"step_{steps:08d}"
        assert re.search(rf"^saving {name}: 0\.\d\d of 0\.\d\d GB, \d s so far$", log, re.M)
        assert len(re.findall(rf"^saving {name}: 0\.\d\d GB in \d s$", log, re.M)) == 1
    assert len(re.findall(r"^checking step_00000002: 0\.\d\d GB in \d s$", log, re.M)) == 1


def test_what_is_quick_is_not_said(capsys):
    with progress.said("saving", 10**9, lambda: 5 * 10**8):
        pass
    assert capsys.readouterr().out == ""


def test_a_hash_is_of_what_was_written(tmp_path):
    """In pieces of any size, larger than what is hashed at once too."""
    pieces: list[bytes] = [b"a", b"b" * 100, bytes(range(256)) * 300_000, b"", b"cd"]
    with (tmp_path / "f").open("wb") as file:
        stream = checksums.HashingStream(file)
        for piece in pieces:
            stream.write(piece)
        assert stream.tell() == stream.size
        stream.close()
    assert (tmp_path / "f").stat().st_size == stream.size
    assert stream.hexdigest() == checksums.hash_file(tmp_path / "f")


def test_every_byte_is_on_disk_before_a_checkpoint_gets_its_name(tmp_path):
    """Otherwise a power cut leaves empty files under it."""

    def plant(rank: int) -> None:
        fsync, rename = os.fsync, Path.rename

        def note(what: str, path: Path) -> None:
            with (tmp_path / "noted").open("a") as file:
                file.write(json.dumps([what, path.name, path.stat().st_size]) + "\n")

        def synced(number: int) -> None:
            fsync(number)
            note("synced", Path(f"/proc/self/fd/{number}").readlink())

        def renamed(self: Path, target: Path) -> Path:
            if self.name.endswith(".unfinished"):
                for path in self.iterdir():
                    note("there", path)
                note("renamed", self)
            return rename(self, target)

        os.fsync, Path.rename = synced, renamed  # type: ignore[assignment]

    keys = argv(tmp_path, "a", ALONE, "train.steps=2")
    with Training(1, keys, tmp_path / "log", plant) as training:
        assert training.exit_codes() == [0]
    noted = [json.loads(line) for line in (tmp_path / "noted").read_text().splitlines()]
    (at,) = [n for n, (what, *_) in enumerate(noted) if what == "renamed"]
    before, after = noted[:at], [name for _, name, _ in noted[at + 1 :]]
    there = {name: size for what, name, size in before if what == "there"}
    synced = {name.removesuffix(".tmp"): size for what, name, size in before if what == "synced"}
    assert set(there) == {"__0_0.distcp", "rank_00000.pt", *checksums.REQUIRED, checksums.NAME}
    assert {name: synced.get(name) for name in there} == there
    assert "step_00000002.unfinished" in synced
    assert "checkpoints" in after
