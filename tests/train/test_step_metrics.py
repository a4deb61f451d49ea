"""What is gathered between two logged steps, kept with a checkpoint."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state

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
    metrics.redone, metrics.waited = 2, 3
    state: Any = metrics.state()
    if as_before:
        state["relayouts"] = state["counts"].pop("relayouts")
        del state["redone"], state["waited"]
    StepMetrics(model, accumulation=1)  # a new start counts from zero
    assert model.runtime.counts.relayouts == {"forward": 0, "backward": 0}
    resumed = StepMetrics(model, accumulation=1)
    resumed.load_state(state)
    assert (resumed.redone, resumed.waited) == ((0, 0) if as_before else (2, 3))
    assert vars(model.runtime.counts) == counted
    return counted


def test_counts_are_kept() -> None:
    config = configure("parallel.expert_parallel=1", "moe.path=fp8_compact")
    for as_before in (False, True):
        (counted,) = run_ranks(1, kept, config, as_before)
        layers = config.model.num_layers
        assert counted["relayouts"] == {"forward": 2 * layers, "backward": 2 * layers}
        assert counted["forward_passes"] == counted["backward_passes"] == layers


def rewound(rank: int, config: Config) -> None:
    """What a step adds to is as before it, though a line of metrics shows most of it as ratios."""
    model = build(config)
    metrics = StepMetrics(model, accumulation=1)
    tokens = torch.zeros(2, config.model.seq_len, dtype=torch.int64)
    for _ in range(2):  # what is summed up from nothing at all, and from something
        mark, before = metrics.mark(), metrics.state()
        model(tokens, tokens).sum().backward()
        assert metrics.state()["counts"]["forward_passes"] != before["counts"]["forward_passes"]
        metrics.rewind(mark)
        found = metrics.state()
        assert found["counts"] == before["counts"]
        assert found["bytes_sent"] == before["bytes_sent"]
        torch.testing.assert_close(found["expert_load"], before["expert_load"], rtol=0, atol=0)
        for name, values in found["auxiliary"].items():
            was = before["auxiliary"].get(name, torch.zeros_like(values))
            assert torch.equal(values, was), name
        model(tokens, tokens).sum().backward()


def test_a_step_is_rewound() -> None:
    run_ranks(2, rewound, configure("parallel.expert_parallel=2", "moe.path=fp8_compact"))


def auxiliary_loss(rank: int, layers: list[int]) -> float:
    """`loss/aux` of the last of several models, one after the other; of those before nothing was
    collected."""
    for count in layers:
        config = configure("parallel.expert_parallel=1", f"model.num_layers={count}")
        model = build(config)
        metrics = StepMetrics(model, accumulation=1)
        tokens = torch.arange(config.model.seq_len).expand(2, -1)
        model(tokens, tokens).sum().backward()
        parallel_state.destroy_model_parallel()
    metrics.steps = 1
    return metrics.collect(0.0)["loss/aux"]


@pytest.mark.parametrize("before", [1, 2, 3])
def test_an_earlier_model_leaves_no_auxiliary_loss(before: int) -> None:
    """megatron-core adds them up in one place of the process, a number for each layer."""
    assert run_ranks(1, auxiliary_loss, [before, 2]) == run_ranks(1, auxiliary_loss, [2])
