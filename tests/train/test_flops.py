"""FLOPs and parameters against published models and against sums done by hand."""

import re
from pathlib import Path

import pytest

from models.config import ModelConfig, MoEConfig
from train.config import load
from train.metrics.flops import count

ROOT = Path(__file__).parents[2]


def qwen3_30b(**changes: object) -> tuple[ModelConfig, MoEConfig]:
    """Qwen3-30B-A3B's published shape."""
    model: dict[str, object] = {
        "num_layers": 48,
        "hidden_size": 2048,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "seq_len": 4096,
        "qk_norm": True,
    }
    moe: dict[str, object] = {"num_experts": 128, "top_k": 8, "ffn_hidden_size": 768}
    for key, value in changes.items():
        (model if key in ModelConfig.model_fields else moe)[key] = value
    return ModelConfig.model_validate(model), MoEConfig.model_validate(moe)


EMBEDDING = 151936 * 2048


def test_qwen3_30b_has_its_published_size() -> None:
    flops = count(*qwen3_30b())
    assert flops.total_params == 30_532_122_624  # "30.5B" on its model card
    # "3.3B activated" on its card, which so counts the input embedding: without it, 3.04.
    assert flops.active_params == pytest.approx(3.35e9, rel=0.001)
    unused = 48 * (128 - 8) * 3 * 2048 * 768
    assert flops.active_params == flops.total_params - unused


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "moe_small"])
def test_a_config_says_the_size_that_a_run_says(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    said = re.search(r"([\d.]+) billion parameters, ([\d.]+)", path.read_text())
    assert said, "its first line"
    config = load(path)
    flops = count(config.model, config.moe)
    for text, number in zip(said.groups(), (flops.total_params, flops.active_params), strict=True):
        digits = len(text.partition(".")[2])
        assert f"{number / 1e9:.{digits}f}" == text


def test_flops_by_hand() -> None:
    matrices = 48 * (
        2048 * (32 + 4 + 4) * 128  # query, key, value
        + 32 * 128 * 2048  # output projection
        + 2048 * 128  # router
        + 8 * 3 * 2048 * 768  # eight experts
    )
    matrices += EMBEDDING  # output layer
    # A token attends to seq_len / 2 others: a dot product and a weighted sum over each of them.
    attention = 48 * (4096 // 2) * 32 * 128 * 2 * 2
    assert count(*qwen3_30b()).flops_per_token == 3 * (2 * matrices + attention)


def test_tying_saves_a_matrix_but_no_arithmetic() -> None:
    free, tied = count(*qwen3_30b()), count(*qwen3_30b(tie_embeddings=True))
    assert free.total_params - tied.total_params == EMBEDDING
    assert free.active_params - tied.active_params == EMBEDDING
    assert free.flops_per_token == tied.flops_per_token


def test_more_experts_cost_memory_and_router_only() -> None:
    few, many = count(*qwen3_30b()), count(*qwen3_30b(num_experts=256))
    router = 48 * 2048 * 128
    assert many.active_params - few.active_params == router
    assert many.flops_per_token - few.flops_per_token == 6 * router
    assert many.total_params - few.total_params == router + 48 * 128 * 3 * 2048 * 768


def test_shared_expert_is_active_for_every_token() -> None:
    without, with_it = count(*qwen3_30b()), count(*qwen3_30b(shared_ffn_hidden_size=1024))
    shared = 48 * 3 * 2048 * 1024
    assert with_it.total_params - without.total_params == shared
    assert with_it.active_params - without.active_params == shared
    assert with_it.flops_per_token - without.flops_per_token == 6 * shared


def test_head_dim_defaults_to_hidden_over_heads() -> None:
    model, moe = qwen3_30b(head_dim=None)
    assert count(model, moe) == count(*qwen3_30b(head_dim=64))


def test_path_does_not_change_the_count() -> None:
    assert count(*qwen3_30b(path="bf16")) == count(*qwen3_30b(path="fp8_direct"))
