"""Segments that grow, unless the environment says something of it; before PyTorch is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.stacks.spec import parse
from tests.support.tiny import argv
from train.allocator import default

ROOT = Path(__file__).parents[2]
NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
REGISTERING = "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK"
GROWING = {NEW: "expandable_segments:True"}


@pytest.mark.parametrize(
    ("environment", "added"),
    [
        ({}, GROWING),
        ({NEW: "max_split_size_mb:64"}, {}),
        ({OLD: "max_split_size_mb:64"}, {}),
        ({NEW: ""}, {}),
        ({REGISTERING: "1"}, {}),
        ({REGISTERING: "0"}, GROWING),
    ],
)
def test_what_is_added_to_an_environment(environment, added):
    assert default(environment) == added


def clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in (NEW, OLD, REGISTERING)}


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {OLD: "max_split_size_mb:64"}])
def test_a_run_sets_it_before_pytorch_and_says_so(tmp_path, own):
    watched = (
        "import sys, train.allocator as a, train.__main__ as m\n"
        "real = a.choose\n"
        "a.choose = lambda: (real(), print('torch loaded:', 'torch' in sys.modules))\n"
        "sys.exit(m.main(sys.argv[1:]))"
    )
    alone = ("parallel.expert_parallel=1", "train.device=cpu", "train.steps=1")
    done = subprocess.run(
        [sys.executable, "-c", watched, *argv(tmp_path, "a", *alone)],
        cwd=ROOT,
        env=clean() | own,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "torch loaded: False" in done.stdout
    said = json.loads((tmp_path / "a" / "environment.json").read_text())["allocator"]
    assert said == next(iter((own or GROWING).values()))


def test_the_benchmark_starts_ours_as_a_training_and_peers_by_their_flags(monkeypatch):
    for name in (NEW, OLD, REGISTERING):
        monkeypatch.delenv(name, raising=False)
    assert parse("bf16").environment == GROWING
    assert parse("stock:bf16").environment == {}
    assert OLD in parse("stock:bf16:environment").environment
    monkeypatch.setenv(OLD, "max_split_size_mb:64")
    assert parse("bf16").environment == {}
