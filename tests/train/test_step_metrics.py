"""What is gathered between two logged steps, kept with a checkpoint."""

from typing import Any

import torch

from tests.models.test_gpt import build, configure
from tests.support.ranks import run_ranks
from train.config import Config
from train.metrics.step import StepMetrics


def kept(rank: int, config: Config, as_before: bool) -> dict[str, Any]:
    """Counts after a step, a save and a resume, `as_before` counts held relayouts apart."""
    model = build(config)
    metrics = StepMetrics(model, accumulation=1)
    tokens = torch.zeros(2, config.model.seq_len, dtype=torch.int64)
    model(tokens, tokens).sum().backward()
    counted = {**vars(model.runtime.counts), "relayouts": model.runtime.counts.relayouts.copy()}
    state: Any = metrics.state()
    if as_before:
        state["relayouts"] = state["counts"].pop("relayouts")
    StepMetrics(model, accumulation=1)  # a new start counts from zero
    assert model.runtime.counts.relayouts == {"forward": 0, "backward": 0}
    StepMetrics(model, accumulation=1).load_state(state)
    assert vars(model.runtime.counts) == counted
    return counted


def test_counts_are_kept() -> None:
    config = configure("parallel.expert_parallel=1", "moe.path=fp8_compact")
    for as_before in (False, True):
        (counted,) = run_ranks(1, kept, config, as_before)
        layers = config.model.num_layers
        assert counted["relayouts"] == {"forward": 2 * layers, "backward": 2 * layers}
        assert counted["forward_passes"] == counted["backward_passes"] == layers
