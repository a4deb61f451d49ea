"""What a machine lacks is one line before anything starts."""

import os
import subprocess
import sys
import types

import pytest
import torch

from models.config import PATH_NAMES
from models.fp8 import operations
from tests.support.tiny import TINY
from train import preflight
from train.__main__ import main
from train.config import ConfigError, load
from train.metrics import environment


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


@pytest.mark.usefixtures("two_gpus")
def test_a_transformer_engine_for_another_cuda(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcudart.so.12:\\nno such file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    for path in PATH_NAMES:
        keys = ["train.steps=1", "parallel.expert_parallel=1", f"run.dir={tmp_path}"]
        assert main([*TINY, *keys, f"moe.path={path}"]) == 2
        assert capsys.readouterr().err == (
            f"error: moe.path={path} cannot run here: transformer_engine does not load "
            "(libcudart.so.12: no such file); "
            "pip install --no-build-isolation -r requirements-gpu.txt\n"
        )


@pytest.mark.usefixtures("two_gpus")
def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"3 processes .* 2 GPU\(s\) here; start torchrun"):
        preflight.check(load(TINY[0], TINY[1:]))


@pytest.mark.usefixtures("two_gpus")
def test_float32_on_a_gpu():
    with pytest.raises(ConfigError, match=r"train\.dtype=fp32 cannot run on a GPU.*dtype=bf16"):
        preflight.check(load(TINY[0], [*TINY[1:], "train.dtype=fp32"]))


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_without_fp8():
    reason = operations.why_not("fp8_compact", "cuda")
    assert reason == (
        "NVIDIA A100 has compute capability 8.0, and FP8 in blocks needs 9.0 (Hopper); "
        "set moe.path=bf16"
    )
    assert operations.why_not("fp8_compact", "cpu") is None


@pytest.mark.parametrize("package", ["triton", "transformer_engine"])
@pytest.mark.usefixtures("two_gpus")
def test_a_missing_package(monkeypatch, package):
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    monkeypatch.setitem(sys.modules, package, None)  # an import of it now fails
    reason = operations.why_not("bf16", "cuda")
    assert reason == f"{package} is missing; {operations.INSTALL}"


def test_the_commit_that_is_said_wins(monkeypatch):
    """For a copy of the code that lies inside another repository."""
    monkeypatch.setenv("SOURCE_COMMIT", "abc123")
    assert environment.commit() == "abc123"
    monkeypatch.delenv("SOURCE_COMMIT")
    assert environment.commit() != "abc123"


def test_asking_for_the_commit_writes_nothing(tmp_path, monkeypatch):
    """Killed in between, git would leave a lock that is in the way of everything later."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    file = tmp_path / "a.py"
    file.write_text("a")
    for command in (["init", "-q"], ["add", "a.py"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    os.utime(file, (1e9, 1e9))  # what the index says of it is old: git would refresh that
    index = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr(environment, "__file__", str(file))
    monkeypatch.delenv("SOURCE_COMMIT", raising=False)
    assert len(environment.commit() or "") == 12
    assert (tmp_path / ".git" / "index").read_bytes() == index
    file.write_text("b")
    assert (environment.commit() or "").endswith("-dirty")


def test_a_model_that_a_machine_without_gpus_cannot_hold(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(preflight, "machine_memory", lambda: 30_000_000_000)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = load("configs/moe_small.yaml", ["parallel.expert_parallel=1"])
    preflight.warn_of_cpu_memory(config)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("PyTorch sees no GPU, and on the CPU this run needs 30.6 GB of memory ")
    assert " this machine has 30.0; " in line
    caplog.clear()
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)  # half of it on each of two machines
    preflight.warn_of_cpu_memory(config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    preflight.warn_of_cpu_memory(config)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(preflight, "machine_memory", lambda: None)
    preflight.warn_of_cpu_memory(config)
    assert not caplog.records
