"""The training benchmark on a CPU: its file, its order, and stacks that fail. Peers need GPUs."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scripts.bench import results, train
from scripts.bench.stock_megatron import choose_dispatch, transformer_arguments
from scripts.bench.train import Row, Spec, Window, parse_stacks, rotated
from tests.support.ranks import _run, run_ranks
from tests.support.tiny import TINY_MODEL
from train.config import load
from train.metrics import flops

TINY = [*TINY_MODEL, "model.num_layers=1"]
SPREADS = ("step_ms", "single_step_ms", "tokens_per_sec_per_gpu", "tflops_per_gpu")


def bench(rank: int, argv: list[str]) -> int:
    return train.main(argv)


def failing_bench(rank: int, argv: list[str]) -> int:
    """Rank 1 runs out of memory when it builds fp8_baseline, and rank 0 does not."""
    real = train.build

    def build(spec, config, ranks):
        if spec.path == "fp8_baseline" and rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 TiB")
        return real(spec, config, ranks)

    train.build = build
    return train.main(argv)


class Uneven:
    """A stack whose step takes rank 1 longer; nobody waits for anybody."""

    def __init__(self, rank: int) -> None:
        self.seconds = 0.01 + 0.05 * rank
        self.dispatch, self.description = "", ""

    def step(self, batches) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.tensor(self.seconds)

    def close(self) -> None: ...


def measured(rank: int) -> Window:
    ranks: Any = SimpleNamespace(device=torch.device("cpu"))
    batches: Any = [None]
    return train.measure(Uneven(rank), batches, ranks, warmup=1, steps=3)


def test_the_slowest_rank_counts():
    windows = run_ranks(2, measured)
    assert windows[0] == windows[1]
    assert windows[0].step_seconds >= 0.06
    assert min(windows[0].single_seconds) >= 0.06
    assert windows[0].final_loss == pytest.approx(0.07), "the ranks' shares add up"


def run(tmp_path: Path, ranks: int, *argv: str, target=bench) -> dict:
    argv = (*TINY, "--out", str(tmp_path), "--warmup", "1", "--steps", "2", *argv)
    assert _run(ranks, target, (list(argv),), 180) == [0] * ranks
    return json.loads((tmp_path / "train_demo_cpu.json").read_text())


@pytest.mark.slow
def test_two_ranks_measure_every_stack_at_every_micro_batch(tmp_path, capfd):
    paths = "bf16,fp8_baseline,fp8_baseline:triton"
    report = run(
        tmp_path, 2, "--paths", paths, "--peers", "none", "--micro-batches", "2,4",
        "--repeats", "2", "moe.force_balance=true",
    )  # fmt: skip
    assert report["machine"]["devices"] == 2
    assert set(report) == {"machine", "versions", "commit", "config", "bench", "rows"}
    assert report["config"]["model"]["seq_len"] == 32
    rows = report["rows"]
    names = [("bf16", None), ("fp8_baseline", None), ("fp8_baseline", "triton")]
    assert [(r["path"], r.get("operations"), r["micro_batch"]) for r in rows] == [
        (*name, micro_batch) for micro_batch in (2, 4) for name in names
    ]
    config = load(TINY[0], TINY[1:])
    count = flops.count(config.model, config.moe).flops_per_token
    for row in rows:
        assert (row["stack"], row["gpus"], row["global_batch"]) == ("ours", 2, 8)
        assert (row["dispatch"], row["repeats"]) == ("all_to_all", 2)
        for name in SPREADS:
            assert set(row[name]) == {"median", "min", "max"}
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        # 8 sequences of 32 tokens a step, half of them on each rank.
        speed = row["tokens_per_sec_per_gpu"]
        assert speed["max"] == pytest.approx(128 / row["step_ms"]["min"] * 1e3)
        assert row["tflops_per_gpu"]["min"] == pytest.approx(speed["min"] * count / 1e12)
        assert "mfu" not in row, "a CPU has no MFU"
        assert "peak_allocated_gib" not in row
        assert 5 < row["final_loss"] < 7, "random tokens: near ln 320 = 5.77"
    losses = [row["final_loss"] for row in rows]
    for bf16, baseline, other_kernels in (losses[:3], losses[3:]):
        assert baseline == other_kernels != bf16, "not the same weights, data and routing"
    output = capfd.readouterr().out
    assert "repeat 2  ours fp8_baseline:triton  micro-batch 4" in output
    assert "TFLOP/s/GPU" in output


def test_a_stack_that_fails_on_one_rank_leaves_the_others_their_turn(tmp_path):
    report = run(
        tmp_path, 2, "--paths", "fp8_baseline,bf16", "--peers", "none", "--repeats", "2",
        target=failing_bench,
    )  # fmt: skip
    failed, measured = report["rows"]
    assert failed["path"] == "fp8_baseline"
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 TiB"
    assert "step_ms" not in failed
    assert measured["path"] == "bf16"
    assert measured["repeats"] == 2


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--peers", "bf16"], "--peers bf16: stock megatron-core trains on GPUs alone; "
                              "pass --peers none"),
        (["--peers", "fp16"], "--peers fp16: known are bf16, fp8, or none"),
        (["--paths", "fp8_compact:triton"], "--paths fp8_compact:triton: fp8_compact takes no "
                                            "'triton'"),
        (["--peers", "fp8:fast"], "--peers fp8:fast: fp8 takes no 'fast'"),
        (["--paths", "none", "--peers", "none"], "--paths none --peers none leaves nothing to "
                                                 "measure"),
        (["--paths", "bf16,bf16"], "a stack is named twice in --paths or --peers"),
        (["--peers", "none", "data.document_mask=true"],
         "data.document_mask=true is not measured; leave it out"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(argv, line, capsys, tmp_path):
    assert train.main([*TINY, "parallel.expert_parallel=1", "--out", str(tmp_path), *argv])
    assert capsys.readouterr().err.strip() == f"error: {line}"
    assert not list(tmp_path.iterdir())


def test_every_stack_comes_first_in_turn():
    specs = parse_stacks("bf16,fp8_compact", "fp8:experimental")
    assert specs == [
        Spec("ours", "bf16"),
        Spec("ours", "fp8_compact"),
        Spec("megatron-core", "fp8", ("experimental",)),
    ]
    a, b, c = specs
    assert [rotated(specs, i) for i in range(4)] == [[a, b, c], [b, c, a], [c, a, b], [a, b, c]]


def test_figures_are_medians_over_repeats():
    config = load(TINY[0], TINY[1:])
    windows = [
        Window(seconds, [seconds] * 2, peak, loss)
        for seconds, peak, loss in ((0.5, 3.0, 5.0), (0.1, 1.0, 4.0), (0.2, 2.0, float("nan")))
    ]
    row = Row(Spec("ours", "bf16"), config, 2, peak_flops=1e12, windows=windows).figures()
    assert row["step_ms"] == pytest.approx({"median": 200, "min": 100, "max": 500})
    assert row["peak_allocated_gib"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert row["tokens_per_sec_per_gpu"]["median"] == pytest.approx(8 * 32 / 2 / 0.2)
    assert row["mfu"]["max"] == pytest.approx(row["tflops_per_gpu"]["max"])
    assert row["final_loss"] is None, "JSON has no NaN"


def test_a_results_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    results.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


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


@pytest.mark.gpu
def test_one_gpu_trains_ours_and_the_peer(tmp_path):
    # A process of its own: it starts CUDA, and the tests fork.
    argv = ["--paths", "bf16,fp8_compact", "--peers", "bf16,fp8", "--steps", "2", "--warmup", "1",
            "--repeats", "2", "--out", str(tmp_path), "parallel.expert_parallel=1"]  # fmt: skip
    command = [sys.executable, "-m", "scripts.bench.train", "configs/demo_cpu.yaml", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "train_demo_cpu.json").read_text())["rows"]
    assert [row["stack"] for row in rows] == ["ours"] * 2 + ["megatron-core"] * 2
    for row in rows:
        assert "error" not in row, done.stderr
        assert row["repeats"] == 2
        assert row["peak_allocated_gib"]["min"] > 0
        assert 5 < row["final_loss"] < 7, "random tokens: near ln 320 = 5.77"
    assert "leaves" not in done.stdout
