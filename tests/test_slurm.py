"""The scripts of slurm/, on a real SLURM of two nodes on this machine."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models.config import PATH_NAMES
from tests.support.slurm_cluster import Cluster, why_not
from tests.support.tiny import TINY, argv, checkpoints, repeated

ROOT = Path(__file__).parent.parent
CONFIG, *KEYS = TINY


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["/bin/bash", f"slurm/{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_dry_run_prints_what_would_run():
    done = script("train.sbatch", CONFIG, "moe.path=bf16", DRY_RUN="1", NPROC_PER_NODE="8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "srun --kill-on-bad-exit=1 torchrun --nnodes 1 --nproc-per-node 8"
    )
    assert done.stdout.rstrip().endswith(f"-m train {CONFIG} moe.path=bf16")


def test_dry_run_of_the_comparison(tmp_path):
    done = script(
        "compare.sh",
        *(CONFIG, "train.steps=7"),
        DRY_RUN="1",
        RUNS=str(tmp_path / "runs"),
        SBATCH_OPTIONS="--nodes 2",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(PATH_NAMES) + 1
    for line, path in zip(lines, PATH_NAMES, strict=False):
        assert line.startswith(f"sbatch --nodes 2 --job-name=moe-{path} ")
        assert f"slurm/train.sbatch {CONFIG} train.steps=7 moe.path={path} run.name={path} " in line
    assert f"--dependency=afterany{':JOB' * len(PATH_NAMES)} " in lines[-1]
    assert all(f"{tmp_path}/runs/{path} " in f"{lines[-1]} " for path in PATH_NAMES)
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing"


def test_bad_input_is_one_line():
    for name in ("train.sbatch", "compare.sh"):
        done = script(name, "configs/none.yaml")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "configs/none.yaml" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("key", ["moe.path=bf16", "run.name=a", "run.dir=/elsewhere"])
def test_keys_that_differ_between_the_runs_are_refused(key):
    """They would be overwritten without a word, or make all runs one."""
    for done in (
        script("compare.sh", CONFIG, "train.steps=7", key, DRY_RUN="1"),
        script("../scripts/demo.sh", "train.steps=7", key, PATH="/nowhere"),
    ):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {key} is set here for each run; ")
        assert done.stderr.count("\n") == 1


def test_nothing_to_do_is_one_line():
    for done, says in (
        (script("compare.sh"), "no config"),
        (script("train.sbatch"), "no config"),
        (script("compare.sbatch"), "nothing to compare"),
        (script("compare.sh", CONFIG, DRY_RUN="1", MOE_PATHS=" "), "names no path"),
    ):
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


def wait(cluster: Cluster, log: Path, what: Callable[[], object], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        if time.monotonic() > deadline:
            said = log.read_text() if log.exists() else "nothing"
            pytest.fail(f"not in {timeout} s; the job said:\n{said}\n{cluster.logs()}")
        time.sleep(0.2)


def submitted(cluster: Cluster, *command: str, **environment: str) -> str:
    """What it prints, run from the root of the repository with one rank a node."""
    settings = {"NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    # After a stop torchrun starts the ranks that often again, each time for nothing.
    settings["MAX_RESTARTS"] = "1"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**cluster.environment, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def rank_of(run_dir: Path) -> int:
    """The process of some rank, on either node."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        started_by_torchrun = words[1:4] == [b"-u", b"-m", b"train"]
        if started_by_torchrun and f"run.dir={run_dir.parent}".encode() in words:
            return int(path.parent.name)
    raise AssertionError("no rank is running")


@pytest.mark.slow
def test_a_requeued_job_goes_on(cluster, tmp_path):
    log, run_dir = tmp_path / "out", tmp_path / "a"
    keys = ["train.steps=300", "checkpoint.every=200", "tracking.mode=offline"]
    job = submitted(
        cluster,
        *("sbatch", "--parsable", "--nodes=2", f"--output={log}", "slurm/train.sbatch"),
        *argv(tmp_path, "a", *keys),
    )
    metrics = run_dir / "metrics.jsonl"
    wait(cluster, log, lambda: metrics.exists() and metrics.read_text().count("\n") >= 5)
    before = repeated(run_dir)
    identity = (run_dir / "wandb_id").read_text()
    # What --signal does before the time limit: to the script alone.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait(cluster, log, lambda: "back into the queue" in log.read_text())
    (saved,) = checkpoints(run_dir)
    assert saved >= len(before)
    assert f"stopped by TRAIN_STOP_FILE after step {saved} of 300" in log.read_text()
    # A rank that dies takes none of the queue's time: torchrun on both nodes starts all again.
    wait(cluster, log, lambda: max(repeated(run_dir)) >= saved + 5)
    os.kill(rank_of(run_dir), signal.SIGKILL)
    wait(cluster, log, lambda: cluster.state(job) in ("COMPLETED", "FAILED", "NODE_FAIL"), 180)
    said = log.read_text()
    assert said.count("start     step ") == 3
    assert said.count(f"job {job}, start") == 2
    assert cluster.state(job) == "COMPLETED", said
    assert f"job {job}, start 0 on 2 node(s): n[1-2]" in said
    assert f"job {job}, start 1 on 2 node(s): n[1-2]" in said
    assert "machine   2 x" in said
    assert said.count(f"start     step {saved} of 300, from") in (1, 2)
    rows = repeated(run_dir)
    assert sorted(rows) == list(range(1, 301))
    assert {step: rows[step] for step in before} == before
    assert checkpoints(run_dir)[-1] == 300
    # Three parts of one W&B run.
    assert (run_dir / "wandb_id").read_text() == identity
    assert len(list(run_dir.glob(f"wandb/offline-run-*-{identity}"))) == 3


@pytest.mark.slow
def test_one_job_a_path_and_then_the_comparison(cluster, tmp_path):
    runs = tmp_path / "runs"
    said = submitted(
        cluster,
        *("bash", "slurm/compare.sh", CONFIG, *KEYS, "train.steps=6"),
        RUNS=str(runs),
        MOE_PATHS="fp8_baseline fp8_compact",
        SBATCH_OPTIONS="--nodes=2",
    )
    job = said.splitlines()[-1].split()[2].rstrip(",")
    log = runs / "compare.out"
    wait(cluster, log, lambda: cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), 180)
    outputs = "\n".join(path.read_text() for path in runs.glob("*.out"))
    assert cluster.state(job) == "COMPLETED", outputs
    assert (runs / "compare" / "compare.html").stat().st_size > 1000
    assert (runs / "compare" / "compare.png").stat().st_size > 1000
    assert repeated(runs / "fp8_baseline") == repeated(runs / "fp8_compact")
    assert len(repeated(runs / "fp8_baseline")) == 6
    assert outputs.count("on 2 node(s): n[1-2]") == 2
