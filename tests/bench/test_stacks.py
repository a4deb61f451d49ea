"""Names and flags of stacks, and what they and our config set of stock megatron-core."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from scripts.bench.measure import __main__ as measure
from scripts.bench.stacks.rungs import RUNG_ENVIRONMENT, RUNGS
from scripts.bench.stacks.spec import STOCK_PATHS, Spec, config_of, parse, parse_all
from scripts.bench.stacks.stock_settings import (
    check,
    choose_dispatch,
    distributed_config,
    transformer_arguments,
)
from tests.support.tiny import TINY_MODEL
from tests.train.test_packages import VERSION_2
from train.config import ConfigError, load

TINY = [*TINY_MODEL, "model.num_layers=1"]


def test_names_of_stacks():
    specs = parse_all("bf16,fp8_direct:triton:prepare,stock:fp8:environment:cutlass")
    assert specs == [
        Spec("ours", "bf16"),
        Spec("ours", "fp8_direct", ("triton", "prepare")),
        Spec("megatron-core", "fp8", ("environment", "cutlass")),
    ]
    assert [parse(str(spec)) for spec in specs] == specs
    assert specs[2].environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert specs[2].environment["NVTE_USE_CUTLASS_GROUPED_GEMM"] == "1"
    assert specs[1].columns() == {
        "stack": "ours", "path": "fp8_direct", "operations": "triton", "flags": ["prepare"],
    }  # fmt: skip
    assert [Spec.of(spec.columns()) for spec in specs] == specs


def test_what_is_started_by_hand_says_what_it_lacks(monkeypatch, capsys):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NVTE_USE_CUTLASS_GROUPED_GEMM"):
        monkeypatch.delenv(name, raising=False)
    (ours, stock) = parse_all("bf16:prepare,stock:bf16:cutlass")
    measure.say_unset(ours)
    assert capsys.readouterr().err == (
        "bf16:prepare is measured without PYTORCH_ALLOC_CONF=expandable_segments:True, "
        "which scripts.bench.train sets\n"
    )
    measure.say_unset(stock)
    assert "without NVTE_USE_CUTLASS_GROUPED_GEMM=1, which" in capsys.readouterr().err
    # As in a run: who configures the allocator decides.
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    monkeypatch.setenv("NVTE_USE_CUTLASS_GROUPED_GEMM", "1")
    measure.say_unset(ours)
    measure.say_unset(stock)
    assert not capsys.readouterr().err


CHOOSES = """
from scripts.bench.measure import __main__ as measure
measure._load_libraries(measure.parse("bf16"))
from scripts.bench.stacks.stock_settings import choose_dispatch
print(choose_dispatch(1))
print(choose_dispatch(2))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "says"),
    [
        (VERSION_2, "deepep"),
        ({"README": ""}, "cannot use it (cannot import name 'Buffer' from 'deep_ep'"),
    ],
)
def test_stock_dispatches_by_the_deep_ep_that_is_installed(tmp_path, files, says):
    """In the process that measures: which module loads megatron-core first is part of it."""
    for name, text in files.items():
        file = tmp_path / "deep_ep" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CHOOSES],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("alltoall\n"), done.stderr
    assert says in (done.stdout + done.stderr).strip().splitlines()[-1], done.stderr


def test_the_stack_of_every_row_can_be_named_again():
    for path in sorted(Path("docs/results").glob("train_*.json")):
        for row in json.loads(path.read_text())["rows"]:
            spec = Spec.of(row)
            assert parse(str(spec)) == spec, path
            for name, value in spec.columns().items():
                assert row.get(name, []) == value, path


def test_which_deep_ep_dispatches():
    overrides = ["moe.dispatch=all_to_all"]
    for flag in ("v1", "v2"):
        spec = parse(f"fp8_direct:{flag}")
        config = config_of(spec, TINY[0], overrides, "balanced", 1)
        assert config.moe.dispatch == f"deep_ep_{flag}", "whatever the config says"
        assert spec.columns()["flags"] == [flag]
    with pytest.raises(ConfigError, match="one of v1 and v2 at most; leave one out"):
        parse("fp8_fused:v1:prepare:v2")
    with pytest.raises(ConfigError, match="fp8 takes no 'v2'"):
        parse("stock:fp8:v2")


def test_only_one_kind_of_operations_is_asked_for():
    assert parse("fp8_baseline:te_dequantize").columns()["operations"] == "te_dequantize"
    with pytest.raises(ConfigError, match="one of triton and te_dequantize at most"):
        parse("fp8_baseline:triton:te_dequantize")


def test_weights_are_prepared_where_a_row_says_so():
    """Whatever a run does by default."""
    for name, more, want in (
        ("fp8_direct", [], False),
        ("fp8_direct:prepare", [], True),
        ("fp8_direct", ["optim.prepare_weights=auto"], "auto"),
    ):
        config = config_of(parse(name), TINY[0], more, "balanced", None)
        assert config.optim.prepare_weights == want


def test_the_peer_gets_our_shape():
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = load("configs/qwen3_30b_a3b_8l.yaml")
    needs_te = {"apply_rope_fusion": False, "moe_permute_fusion": False}
    arguments = transformer_arguments(config, "bf16", (), "deepep")
    stock = TransformerConfig(**(arguments | needs_te))
    assert stock.moe_token_dispatcher_type == "flex"
    assert stock.moe_flex_dispatcher_backend == "deepep"
    assert (stock.num_layers, stock.hidden_size, stock.kv_channels) == (8, 2048, 128)
    assert (stock.num_moe_experts, stock.moe_router_topk) == (128, 8)
    assert stock.moe_ffn_hidden_size == 768
    assert stock.moe_router_force_load_balancing
    assert stock.activation_func is F.silu
    assert stock.expert_model_parallel_size == 4
    assert stock.params_dtype == torch.bfloat16
    assert choose_dispatch(expert_parallel=1) == "alltoall"


def test_the_peers_fp8_is_blockwise_e4m3():
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = load("configs/qwen3_30b_a3b_8l.yaml")
    arguments = transformer_arguments(config, "fp8", ("fp8_param", "router_padding"), "alltoall")
    assert set(arguments) <= set(TransformerConfig.__dataclass_fields__)
    assert (arguments["fp8"], arguments["fp8_recipe"]) == ("e4m3", "blockwise")
    assert arguments["fp8_param"]
    assert arguments["moe_router_padding_for_quantization"]
    assert arguments["moe_token_dispatcher_type"] == "alltoall"


def test_rungs_that_need_a_newer_megatron_say_so():
    config = load("configs/qwen3_30b_a3b_8l.yaml")
    plain = transformer_arguments(config, "bf16", (), "alltoall")
    check(plain)
    graphs = transformer_arguments(config, "bf16", ("attention_graphs",), "alltoall")
    assert graphs["cuda_graph_modules"] == ["attn", "moe_router", "moe_preprocess"]
    with pytest.raises(ConfigError, match=r"megatron-core .* has no no_such_key"):
        check({**plain, "no_such_key": 1})


def test_every_rung_sets_something():
    """Or stock_megatron.py does something else where it is taken."""
    config = load("configs/qwen3_30b_a3b_8l.yaml")

    def settings(path: str, flags: tuple[str, ...]) -> tuple:
        return (
            transformer_arguments(config, path, flags, "alltoall"),
            distributed_config(flags),
            Spec("megatron-core", path, flags).environment,
        )

    idle = [
        rung
        for rung in RUNGS
        if all(settings(path, (rung,)) == settings(path, ()) for path in STOCK_PATHS)
    ]
    assert idle == ["experimental", "no_wgrad_fusion"]
    assert set(RUNG_ENVIRONMENT) <= set(RUNGS)
