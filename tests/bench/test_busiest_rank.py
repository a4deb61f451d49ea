"""How unevenly ranks are loaded, by any router."""

import itertools

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from scripts.bench.measure.busiest_rank import busiest_rank
from scripts.bench.stacks import inputs
from scripts.bench.stacks.ours import Ours
from scripts.bench.stacks.spec import config_of, parse
from tests.support.ranks import _run
from train import parallel

KEYS = ["model.num_layers=2", "parallel.expert_parallel=2", "train.device=cpu"]


class Stock(TopKRouter):
    """Gives a map, as megatron-core's does: experts 0 and 1 to all tokens, 3 to those of rank 1."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        chosen = torch.zeros(len(tokens), 4, dtype=torch.bool)
        chosen[:, :2] = True
        chosen[:, 3] = dist.get_rank() == 1
        return torch.zeros(0), chosen


def stock(rank: int) -> tuple[float | None, float | None]:
    ranks = parallel.start("cpu", 2, 0, 60)
    model = nn.Sequential(nn.Identity(), Stock())
    tokens = torch.zeros(6, 3)
    found = busiest_rank(model, lambda: model(tokens), ranks)
    return found, busiest_rank(nn.Identity(), lambda: None, ranks)


def test_a_map_is_counted():
    for found, nothing in _run(2, stock, (), 120):
        # Rank 0 has 2 experts with 12 rows each, rank 1 has 6 rows.
        assert found == pytest.approx(24 / 15)
        assert nothing is None


def ours(rank: int) -> tuple[float | None, float]:
    config = config_of(parse("bf16"), "configs/demo_cpu.yaml", KEYS, "natural", 2)
    ranks = parallel.start("cpu", 2, 0, 60)
    stack = Ours(config, ranks)
    queue = itertools.cycle(inputs.batches(config, ranks, "natural", 1))
    layers = stack.model.moe_layers()
    for layer in layers:
        layer.expert_load.zero_()
    found = busiest_rank(stack.model, lambda: stack.step(queue), ranks)
    shares = []
    for layer in layers:
        dist.all_reduce(layer.expert_load)
        rows = layer.expert_load.view(2, -1).sum(1).double()
        shares.append(float(rows.max() / rows.mean()))
    return found, sum(shares) / len(shares)


def test_lists_are_counted():
    for found, wanted in _run(2, ours, (), 120):
        assert found == pytest.approx(wanted)
        assert wanted > 1
