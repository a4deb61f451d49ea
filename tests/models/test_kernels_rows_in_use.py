"""What lies behind the last expert's rows, where room is set aside, is never read: a layer by the
kernels, with memory full of NaN, computes what it does without such rows."""

import inspect
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from megatron.core import parallel_state

from models.config import PathName
from models.fp8 import kernels
from scripts.bench.layer.setup import Layer, Shape
from tests.models.test_kernels_numbers import DEVICES, set_up
from train import parallel

TOKENS = 192


def told_where_rows_end(monkeypatch) -> dict[str, bool]:
    """Passes over P rows that the layer makes, and whether each was told where to stop."""
    told: dict[str, bool] = {}
    passes = ("swiglu", "swiglu_quantize", "swiglu_backward", "swiglu_backward_quantize")
    grouped_mm = sys.modules["models.fp8.kernels.grouped_mm"]  # not the function of that name
    for owner, name in [*((kernels, name) for name in passes), (grouped_mm, "values")]:
        call = getattr(owner, name)

        def watched(*arguments, name=name, call=call, **named):
            offsets = inspect.signature(call).bind(*arguments, **named).arguments.get("offsets")
            told[name] = told.get(name, True) and offsets is not None
            return call(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)
    return told


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["bf16", "fp8_direct", "fp8_fused"])
def test_rows_behind_the_last_expert_change_nothing(monkeypatch, device: str, path: PathName):
    ranks = parallel.start(device, 1, 0, 60)
    told = told_where_rows_end(monkeypatch)
    try:
        set_up(monkeypatch, device)
        layer = Layer(Shape(hidden=256, ffn=128, experts=4, top_k=2), TOKENS, ranks.device,
                      "all_to_all")  # fmt: skip
        layer.experts.bfloat16()
        for name in ("x", "grad"):
            tensor = getattr(layer, name).detach().bfloat16()
            setattr(layer, name, tensor.requires_grad_(name == "x"))
        runtime = layer.runtime(path).with_operations(kernels, device)
        assert runtime.ops is kernels
        results = []
        for capacity in (None, 3.0):
            output = layer.forward(replace(runtime, capacity=capacity))
            results.append([output.detach(), *layer.backward(output)])
    finally:
        parallel_state.destroy_model_parallel()
        parallel.stop()
    assert all(told.values())
    quantizing = "_quantize" * (path != "bf16")
    wanted = {f"swiglu{quantizing}", f"swiglu_backward{quantizing}"}
    assert set(told) == wanted | ({"values"} if quantizing else set())
    for exact, roomy in zip(*results, strict=True):
        assert not exact.isnan().any()
        assert torch.equal(exact, roomy)
