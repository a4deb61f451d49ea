"""Runs with `train.profile` and `train.trace_step`: what they log; nothing else changes."""

import gzip
import json
import os
import subprocess
import sys
import time

import pytest

from models.moe.paths import PATHS
from tests.support.paths import EXPECTED
from tests.support.ranks import read_metrics
from tests.support.tiny import TWO_LAYERS
from tests.train.test_train import run
from train import loop
from train.config import ConfigError, load
from train.profiling.moe import STEPS
from train.profiling.step import PARTS

NAMES = {f"time/{part}_ms" for part in (*PARTS, "other")}
LOOKING = [
    *("train.profile=true", "train.profile_every=2", "train.warmup_steps=1"),
    "train.trace_step=3",
]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_a_profiled_run_trains_the_same_and_says_where_time_goes(tmp_path, monkeypatch, path):
    ranks = 2 if path == "fp8_compact" else 1
    common = [f"moe.path={path}", f"parallel.expert_parallel={ranks}", "train.global_batch=4"]
    plain = run(tmp_path, "plain", ranks, *common)
    took = tmp_path / "took"
    monkeypatch.setattr(loop, "step", clocked(loop.step, took))
    rows = run(tmp_path, "profiled", ranks, *common, *LOOKING)
    for name in ("loss/train", "optim/grad_norm", "loss/aux", "moe/dispatched_mib"):
        assert [row[name] for row in rows] == [row[name] for row in plain], name
    relayouts = [row["moe/scale_relayouts"] for row in rows]
    assert relayouts == [row["moe/scale_relayouts"] for row in plain]

    assert not any(NAMES & set(row) for row in plain)
    assert not (tmp_path / "plain" / "trace.json.gz").exists()
    # Of the logged steps after the warm-up, 2 to 5, every second.
    assert [bool(NAMES & set(row)) for row in rows] == [False, True, False, True, False]
    steps_ms = [1e3 * float(seconds) for seconds in took.read_text().split()]
    for row, step_ms in ((rows[1], steps_ms[1]), (rows[3], steps_ms[3])):
        assert set(row) >= NAMES
        times = {name: row[name] for name in NAMES}
        assert sum(times.values()) == pytest.approx(row["time/profiled_step_ms"])
        assert min(times.values()) >= 0
        # All of the step, and one step an interval, which has the profiler's start and stop too.
        assert step_ms <= row["time/profiled_step_ms"] <= row["time/step_ms"]
        expected = NAMES - {"time/relayout_ms", "time/quantize_ms"}
        if "quantize" in EXPECTED[path].parts:
            expected |= {"time/quantize_ms"}
        assert (times["time/relayout_ms"] > 0) == (EXPECTED[path].relayouts > 0)
        for name in expected:
            assert times[name] > 0, name
    # A trace slows its step down, so that step has no part in the throughput.
    assert ["time/step_ms" in row for row in rows] == [False, True, False, True, True]

    with gzip.open(tmp_path / "profiled" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    steps = set(STEPS) & set(EXPECTED[path].parts)
    assert set(named) >= steps | {"attention", "router", "combine", "wgrad", "optimizer"}
    # Two layers, forward and backward, in each micro-batch.
    micro_batches = 4 // (2 * ranks)
    assert named.count("attention") == 2 * 2 * micro_batches
    per_pass = {"fp8_baseline": 5, "fp8_compact": 2}.get(path, 0)
    assert named.count("relayout") == per_pass * 2 * 2 * micro_batches


def clocked(step, took):
    """The first rank's steps, each noted with its seconds."""

    def wrapper(*args):
        begin = time.perf_counter()
        data_seconds = step(*args)
        if os.environ["RANK"] == "0":
            with took.open("a") as file:
                print(time.perf_counter() - begin, file=file)
        return data_seconds

    return wrapper


def test_profile_every_counts_logged_steps(tmp_path):
    keys = ["parallel.expert_parallel=1", "train.steps=9", "train.log_every=2"]
    keys += ["train.profile=true", "train.profile_every=2", "train.warmup_steps=2"]
    rows = run(tmp_path, "a", 1, *keys)
    timed = [row["progress/step"] for row in rows if "time/profiled_step_ms" in row]
    assert [row["progress/step"] for row in rows] == [2, 4, 6, 8, 9]
    assert timed == [4, 8]


def test_a_trace_after_the_last_step_is_refused():
    with pytest.raises(ConfigError, match="trace_step=6 is after the last, steps=5"):
        load(TWO_LAYERS[0], [*TWO_LAYERS[1:], "train.steps=5", "train.trace_step=6"])


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_a_profiled_run_on_a_gpu(tmp_path, path):
    """In a process of its own, as this one must stay able to fork."""

    def train(name: str, *more: str) -> list[dict[str, float]]:
        keys = [f"run.dir={tmp_path}", f"run.name={name}", f"moe.path={path}", "train.steps=6"]
        keys += ["parallel.expert_parallel=1", "train.deterministic=true", "model.seq_len=128"]
        command = [sys.executable, "-m", "train", *TWO_LAYERS, *keys, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return read_metrics(tmp_path / name)

    plain = train("plain")
    rows = train("profiled", *LOOKING)
    for name in ("loss/train", "optim/grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in plain], name
    assert [bool(NAMES & set(row)) for row in rows] == [False, True, False, True, False, True]
    for row in (rows[3], rows[5]):
        times = {name: row[name] for name in NAMES}
        total = row["time/profiled_step_ms"]
        assert sum(times.values()) == pytest.approx(total)
        assert times["time/other_ms"] > 0
        for name in ("attention", "dispatch", "up_projection", "wgrad", "combine", "optimizer"):
            assert 0 < times[f"time/{name}_ms"] < total, name
        assert (times["time/relayout_ms"] > 0) == (path in ("fp8_baseline", "fp8_compact"))
    with gzip.open(tmp_path / "profiled" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("cat") == "kernel" for event in events) > 100
    named = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert named >= {"dispatch", "permute", "up_projection", "attention", "dgrad", "optimizer"}
