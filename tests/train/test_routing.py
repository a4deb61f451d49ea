"""Routing health: its figures from known counts, and what a run leaves of it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.ranks import read_metrics, run_ranks, run_train
from train.metrics.routing import RoutingHealth
from train.metrics.routing_picture import save_heat_map

# What each of two ranks has counted in two layers of four experts.
COUNTS = [[[4, 4, 4, 4], [10, 0, 0, 0]], [[4, 4, 4, 4], [10, 10, 0, 0]]]


def collect(rank: int) -> dict[str, Any]:
    layers: list[Any] = [
        SimpleNamespace(
            expert_load=torch.tensor(counts),
            router=SimpleNamespace(entropy=torch.tensor(0.25 + 0.5 * rank), has_expert_bias=False),
        )
        for counts in COUNTS[rank]
    ]
    routing = RoutingHealth(layers)
    metrics = routing.collect()
    left = sum(int(layer.expert_load.sum()) for layer in layers)
    return {**metrics, **routing.row(7), "left": left}


def test_figures_of_two_ranks() -> None:
    for found in run_ranks(2, collect):
        # Layer 1 got 20, 10, 0 and 0.
        assert found["moe/max_expert_load"] == pytest.approx(20 / 7.5)
        entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(4)
        assert found["moe/load_entropy"] == pytest.approx(entropy)
        assert found["moe/router_entropy"] == pytest.approx(0.5)
        assert found["moe/expert_load"] == [[1, 1, 1, 1], [2.6667, 1.3333, 0, 0]]
        assert found["progress/step"] == 7
        assert found["left"] == 0, "the counters were not set back"


def test_heat_map_has_the_colours_of_the_load(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "map.png"
    save_heat_map(path, [[0.0, 2.0], [1.0, 1.0]], step=5)
    colours = set(Image.open(path).convert("RGB").getdata())
    assert (5, 48, 97) in colours  # no token at all
    assert (103, 0, 31) in colours  # twice the mean
    assert (246, 247, 247) in colours  # the mean


@pytest.mark.slow
def test_a_run_logs_its_routing(tmp_path: Path) -> None:
    argv = [
        "configs/demo_cpu.yaml",
        f"run.dir={tmp_path}",
        "run.name=a",
        "model.seq_len=32",
        "train.micro_batch=2",
        "train.global_batch=8",
        "train.log_every=2",
        "train.valid_every=0",
        "tracking.pictures_every=3",
        "tracking.mode=disabled",
        "data.workers=0",
        "checkpoint.every=4",
    ]
    assert run_train(2, [*argv, "train.steps=4"]) == [0, 0]
    assert run_train(2, [*argv, "train.steps=8"]) == [0, 0]
    rows = read_metrics(tmp_path / "a")
    assert [row["moe/dropped_rows"] for row in rows] == [0, 0, 0, 0]
    assert all(0.5 < row["moe/router_entropy"] < 1 for row in rows), "it has learnt little yet"
    assert all(0 < row["moe/load_entropy"] <= 1 for row in rows)

    # Every third step, at the next one that is logged; the second run continues after the first.
    lines = (tmp_path / "a" / "routing.jsonl").read_text().splitlines()
    maps = {row["progress/step"]: row["moe/expert_load"] for row in map(json.loads, lines)}
    assert list(maps) == [4, 6]
    assert {path.name for path in (tmp_path / "a" / "pictures").iterdir()} == {
        "expert_load_00000004.png",
        "expert_load_00000006.png",
    }
    for step, load in maps.items():
        assert [sum(layer) for layer in load] == pytest.approx([8, 8], abs=1e-3)
        (row,) = (row for row in rows if row["progress/step"] == step)
        assert max(map(max, load)) == pytest.approx(row["moe/max_expert_load"], abs=1e-4)
