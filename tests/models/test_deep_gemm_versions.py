"""What DeepGEMM is told of the rows, by versions old and new; a stand-in takes the call."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import models.fp8
from models.fp8 import reference
from models.fp8.tensor import Layout

OLD = "m_grouped_fp8_gemm_nt_contiguous(a, b, d, m_indices, recipe=None)"
NEW = "m_grouped_fp8_gemm_nt_contiguous(a, b, d, grouped_layout, use_psum_layout=False)"
NAME = "models.fp8.deep_gemm"
EXPERTS = [0, 2, 2, -1]
"""Of each 128 rows: the second of three has none, and behind the last is room."""


@pytest.fixture(params=[OLD, NEW], ids=["2.1", "2.6"])
def version(request, monkeypatch):
    """The module as it is with one version, and the calls that the version got."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    stand_in: Any = ModuleType("deep_gemm")

    def call(_x: Any, _w: Any, _y: Any, layout: Any, **keys: Any) -> None:
        calls.append((layout, keys))

    call.__doc__ = request.param
    stand_in.m_grouped_fp8_gemm_nt_contiguous = call
    stand_in.get_num_sms = lambda: 4
    stand_in.__version__ = request.node.callspec.id
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in)
    kernels: Any = ModuleType("models.fp8.kernels")  # those there want Triton
    kernels.row_experts = lambda _offsets, rows: torch.tensor(EXPERTS).repeat_interleave(128)[:rows]
    monkeypatch.setitem(sys.modules, "models.fp8.kernels", kernels)
    monkeypatch.setitem(sys.modules, "models.fp8.kernels.plan_rows", kernels)
    monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))  # so that it is put back
    monkeypatch.setattr(models.fp8, "deep_gemm", None, raising=False)
    del sys.modules[NAME]
    module: Any = importlib.import_module(NAME)
    return SimpleNamespace(module=module, calls=calls, is_new=request.param is NEW)


def test_it_is_told_where_rows_end(version):
    offsets = torch.tensor([0, 128, 128, 384])
    x = reference.quantize(torch.randn(512, 256).bfloat16(), Layout.GEMM_READY)
    w = reference.quantize_weights(torch.randn(3, 128, 256).bfloat16())
    for _ in range(2):
        y = version.module.grouped_gemm(x, w, offsets, torch.bfloat16)
        assert (y.shape, y.dtype) == ((512, 128), torch.bfloat16)
    (layout, keys), (again, _) = version.calls
    assert again is layout  # each offsets' is made once
    if version.is_new:
        assert (layout.tolist(), layout.dtype) == ([128, 128, 384], torch.int32)
        assert keys == {"use_psum_layout": True, "expected_m_for_psum_layout": 4 * 128}
    else:
        assert layout[::128].tolist() == EXPERTS
        assert not keys


def test_one_kernel_serves_every_number_of_rows_or_whole_waves(version):
    assert version.module.rows_step() == (1 if version.is_new else 4 * 128)


def test_no_rows_no_call(version):
    x = reference.quantize(torch.empty(0, 256).bfloat16(), Layout.GEMM_READY)
    w = reference.quantize_weights(torch.randn(3, 128, 256).bfloat16())
    offsets = torch.zeros(4, dtype=torch.int64)
    y = version.module.grouped_gemm(x, w, offsets, torch.bfloat16)
    assert y.shape == (0, 128)
    assert not version.calls
