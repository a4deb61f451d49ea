"""What is on disk: whole or absent, the right ones kept, and damage detected."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from scripts.export import read_checkpoint
from tests.support.ranks import Training, run_train
from tests.support.tiny import argv, checkpoints, differences, repeated, slow_saves
from train.checkpoint import checksums, files
from train.checkpoint.writer import Writer
from train.config import load

ALONE = "parallel.expert_parallel=1"


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def test_the_last_ones_and_every_so_many_steps_are_kept(tmp_path):
    keys = ["train.steps=7", "checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=3"]
    assert run_train(1, argv(tmp_path, "a", ALONE, *keys)) == [0]
    assert checkpoints(tmp_path / "a") == [3, 6, 7]
    names = {path.name for path in folder_of(tmp_path / "a", 7).iterdir()}
    assert names == {
        *(".metadata", "__0_0.distcp", "rank_00000.pt"),
        *("config.yaml", "training.json", "checksums.sha256"),
    }
    assert load(folder_of(tmp_path / "a", 7) / "config.yaml").train.steps == 7


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """With a disk so slow that a save takes 3 s, steps are trained and logged meanwhile, no reader
    sees half a checkpoint, and what is saved is the state when the save began."""

    def slow_disk(rank: int) -> None:
        slow_saves(3)

    run_dir = tmp_path / "a"
    keys = argv(tmp_path, "a", "train.steps=400", "checkpoint.every=2", "checkpoint.keep=400")
    with Training(2, keys, tmp_path / "log", slow_disk) as training:
        training.wait_until((run_dir / "checkpoints" / "step_00000002.unfinished").is_dir)
        training.wait_until(lambda: max(repeated(run_dir)) >= 3)
        assert checkpoints(run_dir) == [], "finished before it was written"
        training.wait_until(lambda: checkpoints(run_dir) == [2])
    before = repeated(run_dir)
    assert max(before) < 400, "too many steps for the test to mean anything"
    with Training(2, keys, tmp_path / "log") as training:
        training.wait_until(lambda: "start     step" in training.log.read_text())
        training.wait_until(lambda: max(repeated(run_dir)) >= max(before))
    assert "start     step 2 of 400" in training.log.read_text()
    after = repeated(run_dir)
    assert {step: after[step] for step in before} == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with the checkpoints of steps 2 and 4, of 2 ranks."""
    folder = tmp_path_factory.mktemp("saved")
    assert run_train(2, argv(folder, "a", "train.steps=4", "checkpoint.every=2")) == [0, 0]
    return folder / "a"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    """As a power cut leaves a file that was not synced."""
    path.write_bytes(b"")


OF_A_CHECKPOINT = (
    *(".metadata", "__0_0.distcp", "__1_0.distcp", "rank_00000.pt", "rank_00001.pt"),
    *("config.yaml", "training.json", "checksums.sha256"),
)


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop_line(name: str) -> Callable[[Path], None]:
    def drop(path: Path) -> None:
        kept = [line for line in path.read_text().splitlines() if not line.endswith(f"  {name}")]
        path.write_text("".join(f"{line}\n" for line in kept))

    return drop


@pytest.mark.parametrize(
    ("harm", "file", "says"),
    [
        (truncate, "__1_0.distcp", "__1_0.distcp is not what was written"),
        (alter, "__0_0.distcp", "__0_0.distcp is not what was written"),
        (alter, ".metadata", ".metadata is not what was written"),
        (truncate, "rank_00001.pt", "rank_00001.pt is not what was written"),
        (alter, "training.json", "training.json is not what was written"),
        (Path.unlink, "__1_0.distcp", "__1_0.distcp is missing"),
        (Path.unlink, "checksums.sha256", "checksums.sha256 cannot be read"),
        (truncate, "checksums.sha256", None),  # the last line's end alone
        *((empty, name, f"{name} is empty") for name in OF_A_CHECKPOINT),
        (lambda path: path.write_text(path.read_text()[:-30]), "checksums.sha256", "is not a list"),
        (drop_line("rank_00001.pt"), "checksums.sha256", "rank_00001.pt is not in"),
        (drop_line("__0_0.distcp"), "checksums.sha256", "__0_0.distcp is not in"),
        (drop_line("config.yaml"), "checksums.sha256", "config.yaml is not in"),
    ],
)
def test_any_damage_is_found(tmp_path, saved, harm, file, says):
    folder = tmp_path / "copy"
    shutil.copytree(folder_of(saved, 4), folder)
    assert checksums.damage(folder) is None
    harm(folder / file)
    found = checksums.damage(folder)
    assert (found is None) if says is None else (found is not None and says in found)
    # As two ranks that divide the files find it.
    assert any(checksums.damage(folder, share, 2) for share in (0, 1)) == (says is not None)


FOREIGN = (".DS_Store", "._config.yaml", ".nfs0000000001", "model.safetensors", "config.yaml~")


def put_foreign_files(folder: Path) -> None:
    for name in FOREIGN:
        (folder / name).write_text("not ours")
    (folder / ".snapshot").mkdir()


def test_files_that_are_not_ours_are_no_damage(tmp_path, saved):
    """They cost no progress, and a user's files are not deleted with the checkpoint."""
    run_dir = shutil.copytree(saved, tmp_path / "a")
    put_foreign_files(folder_of(run_dir, 4))
    above = run_dir / "checkpoints"
    (above / "step_00000009").write_text("a file")
    (above / "notes.unfinished").mkdir()
    (above / "step_00000008.unfinished").mkdir()
    (above / "step_00000008.unfinished" / "__0_0.distcp").write_text("half")
    for share in (0, 1):
        assert checksums.damage(folder_of(run_dir, 4), share, 2) is None
    keys = argv(tmp_path, "a", "train.steps=6", "checkpoint.keep=1", "checkpoint.every=5")
    with Training(2, keys, tmp_path / "log") as training:
        assert training.exit_codes() == [0, 0]
    log = training.log.read_text()
    assert "damaged" not in log
    assert "start     step 4 of 6" in log
    left = {path.name for path in above.iterdir()}
    assert left == {"step_00000006", "step_00000009", "notes.unfinished", "step_00000004.not_ours"}
    kept = {path.name for path in (above / "step_00000004.not_ours").iterdir()}
    assert kept == {"model.safetensors", "config.yaml~", ".snapshot"}


def test_files_that_are_not_ours_are_not_signed(tmp_path):
    """Files there may disappear while a checkpoint is written."""

    def a_busy_folder(rank: int) -> None:
        quick = Writer.write_data

        def busy(self: Writer, plan: Any, planner: Any) -> Any:
            if rank == 0:
                put_foreign_files(self.folder)
                (self.folder / "__0_9.distcp").write_text("of a save that was cut short")
            return quick(self, plan, planner)

        Writer.write_data = busy  # type: ignore[method-assign]

    keys = argv(tmp_path, "a", ALONE, "train.steps=1")
    with Training(1, keys, tmp_path / "log", a_busy_folder) as training:
        assert training.exit_codes() == [0]
    folder = folder_of(tmp_path / "a", 1)
    assert not set(checksums.read(folder)) & {*FOREIGN, "__0_9.distcp"}
    assert not (folder / "__0_9.distcp").exists()
    for name in FOREIGN:
        (folder / name).unlink()
    assert checksums.damage(folder) is None


def test_steps_have_as_many_digits_as_they_need(tmp_path):
    for step in (99_999_999, 100_000_000, 7):
        files.checkpoint_of(tmp_path, step).mkdir()
    assert [files.step_of(path) for path in files.finished(tmp_path)] == [7, 99999999, 100000000]


@pytest.mark.parametrize(("first", "then"), [(False, True), (True, False), (True, True)])
def test_from_a_cpu_to_a_gpu_and_back(tmp_path, monkeypatch, first, then):
    """TransformerEngine's norms and linears have the state of their FP8 recipe beside the weights,
    and PyTorch's have none."""
    keys = ["train.steps=2", "checkpoint.every=2", "checkpoint.keep=9", "model.qk_norm=true"]
    for as_on_a_gpu, steps in ((first, 2), (then, 4)):
        with monkeypatch.context() as patch:
            if as_on_a_gpu:
                patch.setattr(torch.nn.RMSNorm, "get_extra_state", lambda norm: torch.ones(5))
                patch.setattr(torch.nn.RMSNorm, "set_extra_state", lambda norm, state: None)
            more = [f"train.steps={steps}", "optim.schedule=constant"]
            with Training(2, argv(tmp_path, "a", *keys, *more), tmp_path / "log") as training:
                assert training.exit_codes() == [0, 0]
        newest = folder_of(tmp_path / "a", steps)
        assert "extra_state" not in str(dcp.FileSystemReader(newest).read_metadata())
        names = read_checkpoint(newest)[0]
        assert any("norm" in name for name in names)
        assert not any("extra_state" in name for name in names)
    assert "start     step 2 of 4" in training.log.read_text()


def test_extra_state_of_older_checkpoints_is_not_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "is_of_model", lambda key: True)
    monkeypatch.setattr(torch.nn.RMSNorm, "get_extra_state", lambda norm: torch.ones(5))
    monkeypatch.setattr(torch.nn.RMSNorm, "set_extra_state", lambda norm, state: None)
    assert run_train(2, argv(tmp_path, "a", "train.steps=2")) == [0, 0]
    monkeypatch.undo()
    newest = folder_of(tmp_path / "a", 2)
    assert "extra_state" in str(dcp.FileSystemReader(newest).read_metadata())
    assert not any("extra_state" in name for name in read_checkpoint(newest)[0])
    assert run_train(2, argv(tmp_path, "a", "train.steps=3")) == [0, 0]
    assert checkpoints(tmp_path / "a") == [2, 3]


def test_the_usual_tool_reads_the_checksums(saved):
    subprocess.run(
        ["sha256sum", "-c", "--quiet", checksums.NAME], cwd=folder_of(saved, 4), check=True
    )


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, saved):
    run_dir = shutil.copytree(saved, tmp_path / "a")
    alter(folder_of(run_dir, 4) / "__1_0.distcp")
    folder_of(run_dir, 4).with_name("step_00000004.damaged").symlink_to(tmp_path / "long gone")
    keys = argv(tmp_path, "a", "train.steps=6", "checkpoint.every=2")
    with Training(2, keys, tmp_path / "log") as training:
        assert training.exit_codes() == [0, 0]
    log = training.log.read_text()
    said = f"damaged checkpoint {folder_of(run_dir, 4)}: __1_0.distcp is not what was written"
    assert log.count(said) == 1
    assert "start     step 2 of 6" in log
    # Nothing is deleted that a user may want to inspect.
    assert folder_of(run_dir, 4).with_name("step_00000004.damaged").is_dir()
    assert checkpoints(run_dir) == [4, 6]
    want, got = repeated(saved), repeated(run_dir)
    assert {step: got[step] for step in want} != want, "the schedule is another"
    assert got[2] == want[2]
    assert sorted(got) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("names", [*((name,) for name in OF_A_CHECKPOINT), OF_A_CHECKPOINT])
def test_a_checkpoint_after_a_power_cut(tmp_path, saved, names):
    """Whichever files are empty, they are named, and the previous checkpoint is used."""
    run_dir = shutil.copytree(saved, tmp_path / "a")
    for name in names:
        empty(folder_of(run_dir, 4) / name)
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\0\xff\xfe")
    with Training(2, argv(tmp_path, "a", "train.steps=3"), tmp_path / "log") as training:
        assert training.exit_codes() == [0, 0]
    log = training.log.read_text()
    said = f"damaged checkpoint {folder_of(run_dir, 4)}: {names[-1]} is empty; it is renamed"
    assert log.count(said) == 1
    assert "start     step 2 of 3" in log
    assert "Traceback" not in log
    assert sorted(repeated(run_dir)) == [1, 2, 3]


def test_a_file_that_its_checksum_fits_and_nobody_can_read(tmp_path, saved):
    run_dir = shutil.copytree(saved, tmp_path / "a")
    folder = folder_of(run_dir, 4)
    alter(folder / "rank_00001.pt")
    truncate(folder / "rank_00001.pt")
    sums = checksums.read(folder)
    checksums.write(folder, sums | {"rank_00001.pt": checksums.hash_file(folder / "rank_00001.pt")})
    with Training(2, argv(tmp_path, "a", "train.steps=6"), tmp_path / "log") as training:
        assert training.exit_codes() == [1, 1]
    log = training.log.read_text()
    assert f"error: {folder} cannot be loaded: " in log
    assert "Traceback" not in log


def test_a_damaged_last_checkpoint_of_a_finished_run_is_made_again(tmp_path, saved):
    run_dir = shutil.copytree(saved, tmp_path / "a")
    alter(folder_of(run_dir, 4) / "__1_0.distcp")
    with Training(2, argv(tmp_path, "a", "train.steps=4"), tmp_path / "log") as training:
        assert training.exit_codes() == [0, 0]
    assert "start     step 2 of 4" in training.log.read_text()
    assert not differences(repeated(run_dir), repeated(saved))
    assert checksums.damage(folder_of(run_dir, 4)) is None


def test_no_checkpoint_that_is_whole_is_one_line(tmp_path, saved):
    run_dir = shutil.copytree(saved, tmp_path / "a")
    for step in (2, 4):
        truncate(folder_of(run_dir, step) / "__0_0.distcp")
    with Training(2, argv(tmp_path, "a", "train.steps=6"), tmp_path / "log") as training:
        assert training.exit_codes() == [2, 2]
    lines = training.log.read_text().splitlines()
    assert lines[0].startswith("error: every checkpoint is damaged (")
    assert "step_00000002: __0_0.distcp is not what was written" in lines[0]
    assert "choose another run.name" in lines[0]
    assert "Traceback" not in "".join(lines)
    assert checkpoints(run_dir) == [2, 4], "a damaged one is all there is: it stays"
