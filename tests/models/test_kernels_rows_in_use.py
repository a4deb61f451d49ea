"""What lies behind the last expert's rows, where room is set aside, is never read: a layer by the
kernels, with memory full of NaN, computes what it does without such rows."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from megatron.core import parallel_state

from models.config import PathName
from models.fp8 import kernels
from scripts.bench.layer_setup import Layer, Shape
from tests.models.test_kernels_numbers import DEVICES, set_up
from train import parallel

TOKENS = 192


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["bf16", "fp8_direct", "fp8_fused"])
def test_rows_behind_the_last_expert_change_nothing(monkeypatch, device: str, path: PathName):
    ranks = parallel.start(device, 1, 0, 60)
    try:
        set_up(monkeypatch, device)
        layer = Layer(Shape(hidden=256, ffn=128, experts=4, top_k=2), TOKENS, ranks.device,
                      "all_to_all")  # fmt: skip
        layer.experts.bfloat16()
        for name in ("x", "grad"):
            tensor = getattr(layer, name).detach().bfloat16()
            setattr(layer, name, tensor.requires_grad_(name == "x"))
        runtime = layer.runtime(path).with_operations(kernels, device)
        results = []
        for capacity in (None, 3.0):
            output = layer.forward(replace(runtime, capacity=capacity))
            results.append([output.detach(), *layer.backward(output)])
    finally:
        parallel_state.destroy_model_parallel()
        parallel.stop()
    for exact, roomy in zip(*results, strict=True):
        assert not exact.isnan().any()
        assert torch.equal(exact, roomy)
