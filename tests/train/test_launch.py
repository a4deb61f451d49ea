"""What a launcher has set, or has not, is one line before anything starts."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple

import pytest
from megatron.core import tensor_parallel

from tests.support.ranks import Training, run_alone
from tests.support.tiny import TINY, argv, checkpoints
from train import failure, launch, loop, parallel, preflight
from train.__main__ import main
from train.checkpoint import progress
from train.config import ConfigError, load

VARIABLES = {*launch.TORCHRUN, *launch.NUMBERS, *launch.OTHERS}
GOOD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
        ({"PMI_SIZE": "4"}, "mpiexec started 4 processes"),
        ({"RANK": "0"}, "RANK=0 is in the environment without WORLD_SIZE and MASTER_ADDR and"),
        (GOOD | {"MASTER_ADDR": ""}, "RANK=1 is in the environment without MASTER_ADDR, which"),
        (GOOD | {"MASTER_PORT": "http"}, "MASTER_PORT=http in the environment is not a number"),
        (GOOD | {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment is not a number"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 in the environment makes no sense"),
        ({"LOCAL_WORLD_SIZE": "abc"}, "LOCAL_WORLD_SIZE=abc in the environment is not a number"),
        (GOOD | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 in the environment makes no sense"),
        (GOOD | {"RANK": "2"}, "RANK=2 is none of the WORLD_SIZE=2 ranks"),
    ],
)
def test_what_a_launcher_left_out(monkeypatch, environment, says):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as error:
        launch.check()
    assert says in str(error.value)
    assert "torchrun" in str(error.value) or "unset it" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "environment",
    [{}, GOOD, GOOD | {"SLURM_STEP_NUM_TASKS": "2"}, {"SLURM_STEP_NUM_TASKS": "1"}],
)
def test_what_a_launcher_may_set(monkeypatch, environment):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    launch.check()


def test_srun_without_torchrun_is_one_line(tmp_path):
    command = [sys.executable, "-m", "train", *argv(tmp_path, "a", "train.steps=1")]
    environment = {"PATH": "", "SLURM_STEP_NUM_TASKS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: srun started 2 processes")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("host", ["nowhere.invalid", "node..1", "n" * 64, "two words"])
def test_a_meeting_point_that_is_nowhere(tmp_path, monkeypatch, capsys, host):
    """At once, also where a launcher has a store of its own."""
    for variable, value in (GOOD | {"MASTER_ADDR": host}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(failure, "PATIENCE_S", 0.1)
    assert main(argv(tmp_path, "a", "train.steps=1")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: MASTER_ADDR={host} cannot be found from ")
    assert "by which all nodes know the machine of rank 0" in said
    assert said.count("\n") == 1


@pytest.fixture
def silent_port():
    """The port of an address where nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "waits_for", "says"),
    [
        ({"RANK": "1"}, "rank 1 waits for rank 0", "nobody has answered there for 3 s (Connection"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, "rank 0 waits for torchrun", "nobody has ans"),
        ({}, "rank 0 waits for the other ranks", "1/2 clients joined"),
    ],
)
def test_a_meeting_point_where_nobody_comes(tmp_path, silent_port, environment, waits_for, says):
    def plant(rank: int) -> None:
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")
        port = silent_port if environment else 0
        os.environ |= {"WORLD_SIZE": "2", "MASTER_PORT": str(port)} | environment
        progress.AFTER_S = 1.0
        loop.MARGIN_S = 0  # beside timeout_s

    keys = argv(tmp_path, "a", "train.steps=1", "parallel.timeout_s=3")
    begin = time.monotonic()
    with Training(1, keys, tmp_path / "log", plant) as training:
        assert training.exit_codes(120) == [1]
    assert time.monotonic() - begin < 15
    waiting, error = training.log.read_text().splitlines()
    assert re.fullmatch(
        waits_for + r" at MASTER_ADDR:MASTER_PORT=127\.0\.0\.1:\d+: 1 s so far of at most 3 s",
        waiting,
    )
    rank = environment.get("RANK", "0")
    where = "MASTER_ADDR:MASTER_PORT=127.0.0.1:"
    assert error.startswith(f"error: rank {rank} cannot meet the others at {where}")
    assert says in error


@pytest.mark.slow
def test_a_meeting_point_where_somebody_else_listens(tmp_path):
    """PyTorch, which waits for an answer forever, is not waited for."""

    def plant(rank: int) -> None:
        os.environ |= {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        loop.MARGIN_S = 0  # beside timeout_s
        parallel.ATTEMPT_S = 1

    keys = argv(tmp_path, "a", "train.steps=1", "parallel.timeout_s=1")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with Training(1, keys, tmp_path / "log", plant) as training:
            assert training.exit_codes(30) == [1]
    (error,) = training.log.read_text().splitlines()
    assert "one that listens there does not speak as torchrun or a rank would" in error


@pytest.mark.slow
def test_a_rank_that_starts_later_is_named(tmp_path):
    def plant(rank: int) -> None:
        progress.AFTER_S = 0.5
        if rank == 1:
            time.sleep(4)

    keys = argv(tmp_path, "a", "train.steps=1")
    with Training(2, keys, tmp_path / "log", plant) as training:
        assert training.exit_codes() == [0, 0]
    said = training.log.read_text()
    assert re.search(r"^rank 0 waits for rank 1 to start: \d s so far$", said, re.M)


def test_shared_memory_that_is_too_small(monkeypatch):
    """64 MB, as a container has, are enough for a few small batches and not for many large ones."""
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64e6, 0, 64e6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    keys = [*TINY[1:], "data.workers=8", "train.global_batch=null", "model.seq_len=8192"]
    preflight.check_shared_memory(load(TINY[0], [*keys, "train.micro_batch=1"]))
    config = load(TINY[0], [*keys, "train.micro_batch=2"])
    # 2 x 8192 tokens of 24 bytes, 4 a worker and one in use, on 8 ranks.
    with pytest.raises(ConfigError, match=r"data\.workers=8 needs 103\.8 MB .* 64\.0 MB free"):
        preflight.check_shared_memory(config)
    preflight.check_shared_memory(load(TINY[0], [*keys, "train.micro_batch=2", "data.workers=0"]))


def test_a_batch_that_cannot_be_handed_over_ends_the_training(tmp_path):
    """As where shared memory is full: at once, and not after parallel.timeout_s."""

    def plant(rank: int) -> None:
        from multiprocessing.reduction import ForkingPickler

        import torch

        def full(tensor):
            raise RuntimeError("unable to allocate shared memory: No space left on device (28)")

        ForkingPickler.register(torch.Tensor, full)

    keys = argv(tmp_path, "a", "train.steps=4", "data.workers=1", "parallel.expert_parallel=1")
    with Training(1, keys, tmp_path / "log", plant) as training:
        assert training.exit_codes(40) == [1]
    log = training.log.read_text()
    assert "WARNING: a data worker cannot hand over a batch (unable to allocate" in log
    assert log.count("error: rank 0: a process that prepares data died") == 1
    assert "/dev/shm" in log
    assert "Traceback" not in log
    assert checkpoints(tmp_path / "a") == []


def numbers_kept_after_a_gpu() -> list[str]:
    """What megatron-core keeps for its generators, in a process that used a GPU before."""
    tensor_parallel.random.initialize_rng_tracker()  # as `start` does for a GPU
    parallel.start("cpu", 1, 0, timeout_s=60)
    return list(tensor_parallel.get_cuda_rng_tracker().get_states())


def test_a_start_on_another_device_draws_as_a_first_one():
    assert run_alone(numbers_kept_after_a_gpu) == []
