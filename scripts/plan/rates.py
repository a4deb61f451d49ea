"""How fast kernels are, from measurements: `kernels.json`, `step_kernels.json` and, for what
waiting costs, `moe_layer.json`."""

import json
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scripts.plan import work
from train.config import Config
from train.planning.shapes import Shape, shape_of

RESULTS = Path(__file__).parents[2] / "docs" / "results"

TRACED = ("train_qwen3_30b_a3b_8l.json", 2, 4)
"""The traced step of step_kernels.json: its config, GPUs and micro-batch."""


WAITED = "qwen3_30b_a3b"
"""The shape of moe_layer.json from which the cost of waiting is taken; the others are checked."""


@dataclass(frozen=True)
class Rates:
    """Rates of the GPU that was measured: FLOP/s, or bytes per second."""

    attention: float
    dense: float
    """Attention's projections and the output layer, in BF16."""
    bf16: float
    """Experts' GEMMs, forward and of the data's gradient."""
    bf16_wgrad: float
    fp8: float
    """The same in FP8, as `fp8_direct` calls them."""
    stock_fp8: float
    """Dense GEMMs of cuBLAS in FP8, of which TransformerEngine's for all experts reach a share."""
    moving: float
    """Rate of a kernel that only moves bytes."""
    optimizer: float
    """Rate of AdamW and the gradient's norm."""
    dispatch: float
    """DeepEP's kernels over NVLink, the wait for other ranks in it."""
    wait_ms: float
    """Cost of waiting for the count of rows, per layer: how much longer permuting takes in the
    forward pass, where it waits, than in the backward pass."""


@cache
def measured(results: Path = RESULTS) -> Rates:
    """Read the rates from the files. Raises OSError, KeyError, ValueError."""
    kernels = _read(results / "kernels.json")["rows"]
    traced = {row["traced"]: row["ms"] for row in _read(results / "step_kernels.json")["rows"]}
    bf16 = {kind: ms / 1e3 for kind, ms in traced["bf16"].items()}
    shape = traced_shape(results)
    flops, sent = work.flops(shape), work.dispatched(shape)
    return Rates(
        attention=flops["attention"] / bf16["attention"],
        dense=flops["dense GEMMs"] / bf16["dense GEMMs"],
        bf16=flops["expert GEMMs"] / bf16["expert GEMMs"],
        bf16_wgrad=flops["expert weight gradients"] / bf16["expert weight gradients"],
        fp8=_median(kernels, "tflops", "grouped_gemm its own", "DeepGEMM") * 1e12,
        stock_fp8=_median(kernels, "tflops", "dense FP8 1x128, 128x128", "cuBLAS") * 1e12,
        moving=statistics.median(row["gb_per_s"] for row in kernels if _moves(row)) * 1e9,
        optimizer=work.optimizer_bytes(shape) / bf16["optimizer, gradient norm"],
        dispatch=sum(sent.values()) / bf16["dispatch and combine"],
        wait_ms=statistics.median(
            row["forward_parts_ms"]["permute"]["median"]
            - row["backward_parts_ms"]["permute"]["median"]
            for row in _read(results / "moe_layer.json")["rows"]
            if row["shape"] == WAITED and row["path"] in ("bf16", "fp8_direct")
        ),
    )


def traced_shape(results: Path = RESULTS) -> Shape:
    """The shape of the step in step_kernels.json."""
    name, gpus, micro_batch = TRACED
    config = Config.model_validate(_read(results / name)["config"])
    return shape_of(config, gpus, micro_batch=micro_batch)


def _moves(row: dict[str, Any]) -> bool:
    """Whether a row is of a kernel of ours that reads and writes and computes little."""
    return row["by"] == "ours" and "gb_per_s" in row


def _median(rows: list[dict[str, Any]], key: str, kernel: str, by: str) -> float:
    return statistics.median(
        row[key] for row in rows if row["kernel"] == kernel and row["by"] == by
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
