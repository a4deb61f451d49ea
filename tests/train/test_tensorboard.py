"""TensorBoard's event files hold what metrics.jsonl does, read back with its own library."""

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tests.support.ranks import read_metrics, run_alone, run_train
from tests.support.tiny import TINY, argv
from train import preflight
from train.config import Config, ConfigError, load
from train.metrics import tensorboard
from train.metrics.tensorboard import TensorBoard

needs_tensorboard = pytest.mark.skipif(
    tensorboard.why_not() is not None, reason="tensorboard is not installed"
)


def read_events(folder: Path) -> dict[str, Any]:
    """By tag: scalars as lists of (step, value), pictures as lists of (step, PNG)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    found: dict[str, Any] = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]
    }
    for tag in tags["images"]:
        found[tag] = [(one.step, one.encoded_image_string) for one in events.Images(tag)]
    found["tensors"] = {
        tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        for tag in tags["tensors"]
    }
    return found


def config_of(folder: Path, *keys: str) -> Config:
    return load(TINY[0], [*TINY[1:], f"run.dir={folder}", "tracking.backend=tensorboard", *keys])


@needs_tensorboard
@pytest.mark.slow
def test_a_run_and_its_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")  # nobody asks W&B
    keys = ["tracking.backend=tensorboard", "tracking.mode=auto", "tracking.pictures_every=3"]
    keys += ["train.valid_every=4", "train.valid_batches=1", "checkpoint.every=2"]
    keys += ["parallel.expert_parallel=1"]
    assert run_train(1, argv(tmp_path, "a", *keys, "train.steps=4")) == [0]
    assert run_train(1, argv(tmp_path, "a", *keys, "train.steps=8")) == [0]
    folder = tmp_path / "a"
    assert not (folder / "wandb").exists()
    found = run_alone(read_events, folder / "tensorboard")
    rows = {int(row["progress/step"]): row for row in read_metrics(folder)}
    assert sorted(rows) == list(range(1, 9))
    names = {name for row in rows.values() for name in row}
    assert {"loss/train", "loss/valid_bpb", "moe/max_expert_load", "progress/tokens"} <= names
    for name in names:
        want = [(step, row[name]) for step, row in rows.items() if name in row]
        assert [step for step, _ in found[name]] == [step for step, _ in want], name
        assert [value for _, value in found[name]] == pytest.approx(
            [value for _, value in want], rel=1e-6
        )
    (first, png), (second, _) = found["moe/expert_load"]
    assert (first, second) == (3, 6)
    (tmp_path / "a.png").write_bytes(png)
    drawn = imread(folder / "pictures" / "expert_load_00000003.png")[..., :3]
    assert np.abs(imread(tmp_path / "a.png")[..., :3] - drawn).max() < 0.01
    assert [step for step, _ in found["loss/valid_final"]] == [4, 8]
    configs = found["tensors"]["config/text_summary"]
    assert "      path: bf16\n" in configs[0]
    assert "device_name" in configs[0]


def killed_and_resumed(folder: Path) -> dict[str, Any]:
    """Logged up to step 6 and then killed; resumed after step 4."""
    first = TensorBoard(config_of(folder), folder)
    for step in range(1, 7):
        first.log({"loss/train": step}, step)
    assert first._writer is not None
    first._writer.flush()
    second = TensorBoard(config_of(folder), folder, first_step=4)
    for step in range(5, 9):
        second.log({"loss/train": 10 * step}, step)
    second.finish()
    return read_events(folder / "tensorboard")


@needs_tensorboard
def test_no_step_is_there_twice_after_a_kill(tmp_path):
    found = run_alone(killed_and_resumed, tmp_path)
    assert found["loss/train"] == [
        *((step, step) for step in range(1, 5)),
        *((step, 10 * step) for step in range(5, 9)),
    ]


class Broken:
    """Whatever it is asked, it fails."""

    def add_scalar(self, *_: object) -> None:
        raise RuntimeError("the disk\nis full")

    add_text = add_image = add_scalar

    def close(self) -> None:
        raise RuntimeError("closed")


def test_a_failure_is_one_warning(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    module: Any = type(sys)("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    module.SummaryWriter = lambda *_, **__: Broken()
    tracker = TensorBoard(config_of(tmp_path), tmp_path)
    assert tracker.describe() == "TensorBoard: off"
    for step in (1, 2):
        tracker.log({"loss/train": 1.0}, step)
    tracker.picture("a", tmp_path / "none.png", 1)
    tracker.summary({"a": 1})
    tracker.finish()
    (warning,) = [r.getMessage() for r in caplog.records if "tensorboard" in r.name]
    assert warning == (
        "TensorBoard failed; training continues without it (RuntimeError: the disk is full)"
    )


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError) as error:
        preflight.check(config_of(tmp_path))
    assert str(error.value) == (
        "tracking.backend=tensorboard: the package tensorboard is missing; pip install "
        "tensorboard, or set tracking.backend=wandb"
    )
    preflight.check(config_of(tmp_path, "tracking.backend=wandb"))
