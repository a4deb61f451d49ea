"""What DeepGEMM is told, by its versions; a stand-in takes the call."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import models.fp8
from models.fp8 import reference
from models.fp8.tensor import Layout

NAME = "models.fp8.deep_gemm"
ENDS = (0, 128, 128, 384)
"""Of three experts' rows, the second has none; behind them is room for 128 more."""
OTHER_ENDS = (0, 256, 384, 384)


@pytest.fixture(params=[None, "2.1.1", "2.3.0", "2.6.1"])
def version(request, monkeypatch):
    """The module as it is with a version, and the calls that DeepGEMM got."""
    calls: list[SimpleNamespace] = []
    stand_in: Any = ModuleType("deep_gemm")

    def call(x: Any, w: Any, y: Any, layout: Any, **keys: Any) -> None:
        calls.append(SimpleNamespace(x=x, w=w, y=y, layout=layout, keys=keys))

    stand_in.m_grouped_fp8_gemm_nt_contiguous = call
    stand_in.get_num_sms = lambda: 4
    if request.param:
        stand_in.__version__ = request.param
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in)
    kernels: Any = ModuleType("models.fp8.kernels")  # those there want Triton
    kernels.row_experts = row_experts
    monkeypatch.setitem(sys.modules, "models.fp8.kernels", kernels)
    monkeypatch.setitem(sys.modules, "models.fp8.kernels.plan_rows", kernels)
    monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))  # so that it is put back
    monkeypatch.setattr(models.fp8, "deep_gemm", None, raising=False)
    del sys.modules[NAME]
    module: Any = importlib.import_module(NAME)
    return SimpleNamespace(module=module, calls=calls, takes_ends=request.param == "2.6.1")


def row_experts(offsets: torch.Tensor, rows: int) -> torch.Tensor:
    of_rows = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    return torch.cat([of_rows, of_rows.new_full((rows - len(of_rows),), -1)])


def operands(layout: Layout = Layout.GEMM_READY) -> tuple[Any, Any]:
    x = reference.quantize(torch.randn(512, 256).bfloat16(), layout)
    return x, reference.quantize_weights(torch.randn(3, 128, 256).bfloat16())


def test_it_is_told_where_rows_end(version):
    x, w = operands()
    first, other = torch.tensor(ENDS), torch.tensor(OTHER_ENDS)
    for offsets in (first, first, other):
        y = version.module.grouped_gemm(x, w, offsets, torch.bfloat16)
        assert (y.shape, y.dtype) == ((512, 128), torch.bfloat16)
        assert version.calls[-1].y is y
    once, again, another = version.calls
    assert again.layout is once.layout  # each offsets' is made once
    for call, ends in ((once, ENDS), (another, OTHER_ENDS)):
        if version.takes_ends:
            assert (call.layout.tolist(), call.layout.dtype) == (list(ends[1:]), torch.int32)
            assert call.keys == {"use_psum_layout": True, "expected_m_for_psum_layout": 4 * 128}
        else:
            assert call.layout.tolist() == row_experts(torch.tensor(ends), 512).tolist()
            assert not call.keys


def test_it_gets_rows_and_weights_with_their_scales(version):
    x, w = operands()
    version.module.grouped_gemm(x, w, torch.tensor(ENDS), torch.bfloat16)
    (call,) = version.calls
    assert call.x[0] is x.data
    assert call.x[1].shape == (512, 2)  # a row's scales in a row, however they lie
    assert torch.equal(call.x[1], x.row_scales)
    assert call.w[0] is w.data
    assert call.w[1] is w.scale_inv


def test_one_kernel_serves_every_number_of_rows_or_whole_waves(version):
    assert version.module.rows_step() == (1 if version.takes_ends else 4 * 128)


def test_no_rows_no_call(version):
    _, w = operands()
    x = reference.quantize(torch.empty(0, 256).bfloat16(), Layout.GEMM_READY)
    offsets = torch.zeros(4, dtype=torch.int64)
    y = version.module.grouped_gemm(x, w, offsets, torch.bfloat16)
    assert y.shape == (0, 128)
    assert not version.calls


def test_refusals(version):
    x, w = operands(Layout.COMPACT)
    with pytest.raises(ValueError, match="GEMM_READY"):
        version.module.grouped_gemm(x, w, torch.tensor(ENDS), torch.bfloat16)
    x, _ = operands()
    with pytest.raises(TypeError, match="float32"):
        version.module.grouped_gemm(x, w, torch.tensor(ENDS), torch.float32)


def test_the_user_is_told_which_version_it_is_and_which_is_faster(version):
    said = version.module.SAID
    assert said.startswith(f"DeepGEMM {version.module.VERSION}")
    assert ("2.6 leaves out" in said) is not version.takes_ends
