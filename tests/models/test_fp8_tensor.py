"""Block-scaled tensors: what they refuse, and the counted relayout."""

import dataclasses
import sys
import threading
from typing import Any

import pytest
import torch

from models.fp8 import reference as ops
from models.fp8 import tensor
from models.fp8.tensor import (
    BLOCK,
    BlockScaledTensor,
    BlockScaledWeights,
    Layout,
    ceil_div,
    relayout,
    scale_shape,
)
from models.moe.counts import Counts
from models.moe.dispatch.trip import Trip

E4M3 = torch.float8_e4m3fn
COMPACT, GEMM_READY = Layout.COMPACT, Layout.GEMM_READY


@pytest.fixture
def trip():
    """A trip of nothing, to call what a path calls."""
    nobody: Any = None
    nothing = torch.empty(0, 1)
    return Trip(nobody, ops, Counts(), nothing.long(), nothing, 1, BLOCK)


def make(rows, cols, layout, gen):
    """Random bytes and scales, padding zero, built without the functions under test."""
    data = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, generator=gen).view(E4M3)
    scales = torch.rand(rows, ceil_div(cols, BLOCK), generator=gen) + 0.5
    if layout is GEMM_READY:
        padding = torch.zeros(scales.shape[1], -rows % 4)
        scales = torch.cat([scales.t(), padding], dim=1).contiguous()
    return BlockScaledTensor(data, scales, layout)


def bits(x):
    return x.view(torch.uint8) if x.dtype is E4M3 else x.view(torch.int32)


def same(a, b):
    return (
        a.layout is b.layout
        and torch.equal(bits(a.data), bits(b.data))
        and a.scale_inv.shape == b.scale_inv.shape
        and torch.equal(bits(a.scale_inv), bits(b.scale_inv))
    )


def test_scale_shapes():
    assert scale_shape(5, 300, COMPACT) == (5, 3)
    assert scale_shape(5, 300, GEMM_READY) == (3, 8)
    assert scale_shape(8, 256, GEMM_READY) == (2, 8)
    assert scale_shape(0, 256, COMPACT) == (0, 2)
    assert scale_shape(0, 256, GEMM_READY) == (2, 0)


def test_properties(gen):
    x = make(6, 200, GEMM_READY, gen)
    assert (x.rows, x.cols, x.device.type) == (6, 200, "cpu")
    assert x.nbytes == 6 * 200 + 2 * 8 * 4


def test_frozen(gen):
    x = make(4, 128, COMPACT, gen)
    with pytest.raises(dataclasses.FrozenInstanceError):
        x.layout = GEMM_READY


@pytest.mark.parametrize("layout", Layout)
def test_wrong_dtypes(layout, gen):
    x = make(8, 256, layout, gen)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        BlockScaledTensor(x.data.view(torch.uint8), x.scale_inv, layout)
    with pytest.raises(TypeError, match="float32"):
        BlockScaledTensor(x.data, x.scale_inv.double(), layout)


@pytest.mark.parametrize("layout", Layout)
def test_scales_of_the_other_layout(layout, gen):
    x = make(8, 256, layout, gen)
    other = COMPACT if layout is GEMM_READY else GEMM_READY
    with pytest.raises(ValueError, match="needs scale_inv"):
        BlockScaledTensor(x.data, x.scale_inv, other)


def test_a_transposed_view_is_not_a_layout(gen):
    x = make(8, 256, COMPACT, gen)
    with pytest.raises(ValueError, match="contiguous"):
        BlockScaledTensor(x.data, x.scale_inv.t(), GEMM_READY)


def test_missing_padding(gen):
    x = make(6, 256, GEMM_READY, gen)
    with pytest.raises(ValueError, match="needs scale_inv"):
        BlockScaledTensor(x.data, x.scale_inv[:, :6].contiguous(), GEMM_READY)


def test_data_must_be_a_matrix(gen):
    x = make(8, 256, COMPACT, gen)
    with pytest.raises(ValueError, match=r"\[M, K\]"):
        BlockScaledTensor(x.data[None], x.scale_inv, COMPACT)


def test_weights_are_checked():
    data = torch.zeros(2, 200, 300).to(E4M3)
    BlockScaledWeights(data, torch.ones(2, 2, 3))
    with pytest.raises(ValueError, match="needs scale_inv"):
        BlockScaledWeights(data, torch.ones(2, 3, 2))
    with pytest.raises(ValueError, match=r"\[E, N, K\]"):
        BlockScaledWeights(data[0], torch.ones(2, 3))
    with pytest.raises(TypeError):
        BlockScaledWeights(data, torch.ones(2, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 256), (1, 128), (5, 300), (8, 1024), (3, 3 * 128), (130, 1)])
@pytest.mark.parametrize("start", Layout)
def test_round_trip_is_bitwise(shape, start, gen):
    x = make(shape[0], shape[1], start, gen)
    other = COMPACT if start is GEMM_READY else GEMM_READY
    there = relayout(x, other)
    assert same(there, dataclasses.replace(there))  # the constructor accepts it: shape fits
    assert same(relayout(there, start), x)
    assert there.data is x.data


def test_every_scale_lands_where_the_layout_says(gen):
    compact = make(5, 300, COMPACT, gen)
    ready = relayout(compact, GEMM_READY)
    for m in range(5):
        for b in range(3):
            assert ready.scale_inv[b, m] == compact.scale_inv[m, b]
    assert (ready.scale_inv[:, 5:] == 0).all()


def test_square_scales_are_not_guessed(gen):
    """M = K / 128, a multiple of 4: both layouts have one shape, and only the label tells."""
    compact = make(4, 4 * 128, COMPACT, gen)
    ready = relayout(compact, GEMM_READY)
    assert ready.scale_inv.shape == compact.scale_inv.shape
    assert torch.equal(ready.scale_inv, compact.scale_inv.t())
    assert not torch.equal(ready.scale_inv, compact.scale_inv)
    torch.testing.assert_close(ready.float32(), compact.float32(), rtol=0, atol=0, equal_nan=True)
    mislabelled = BlockScaledTensor(compact.data, compact.scale_inv, GEMM_READY)
    assert not torch.equal(mislabelled.float32().nan_to_num(), compact.float32().nan_to_num())


def test_counts_are_exact_and_apart(trip, gen):
    x = make(4, 128, COMPACT, gen)
    y = trip.relayout(x, GEMM_READY)
    assert same(y, relayout(x, GEMM_READY))
    trip.relayout(y, COMPACT)
    trip.phase = "backward"
    trip.relayout(x, GEMM_READY)
    assert trip.counts.relayouts == {"forward": 2, "backward": 1}
    with trip.counts.paused():
        trip.relayout(x, GEMM_READY)
    assert trip.counts.relayouts == {"forward": 2, "backward": 1}
    trip.counts.reset()
    assert trip.counts.relayouts == {"forward": 0, "backward": 0}


@pytest.mark.parametrize("layout", Layout)
def test_a_redundant_relayout_is_an_error_and_not_counted(layout, trip, gen):
    with pytest.raises(ValueError, match="already"):
        trip.relayout(make(4, 128, layout, gen), layout)
    assert trip.counts.relayouts == {"forward": 0, "backward": 0}


def test_counter_refuses_an_unknown_phase(trip, gen):
    trip.phase = "sideways"
    with pytest.raises(KeyError, match="sideways"):
        trip.relayout(make(4, 128, COMPACT, gen), GEMM_READY)


def test_counts_from_the_thread_that_runs_backward(trip, gen):
    """Autograd's GPU threads are not the main thread: the count must not be thread-local."""
    x = make(4, 128, COMPACT, gen)
    trip.phase = "backward"
    thread = threading.Thread(target=trip.relayout, args=(x, GEMM_READY))
    thread.start()
    thread.join()
    assert trip.counts.relayouts["backward"] == 1


def test_no_operation_makes_a_relayout(gen, monkeypatch):
    """Only a path does, through its trip, where it is counted."""

    def uncounted(*_):
        raise AssertionError("a relayout that no trip counts")

    modules = [m for name, m in sys.modules.items() if name.startswith("models.")]
    for module in modules:
        if getattr(module, "relayout", None) is tensor.relayout and module is not tensor:
            monkeypatch.setattr(module, "relayout", uncounted)
    monkeypatch.setattr(tensor, "relayout", uncounted)
    x = torch.randn(128, 256, generator=gen)
    w = ops.quantize_weights(torch.randn(1, 128, 256, generator=gen))
    offsets = torch.tensor([0, 128])
    row_map = ops.plan_rows(torch.zeros(128, 1, dtype=torch.int64), 1)
    for layout in Layout:
        ops.grouped_gemm(ops.quantize(x, layout), w, offsets, torch.float32)
        ops.quantize_columns(x, layout)
    compact = ops.quantize(x, COMPACT)
    ops.permute_scaled(compact, row_map)
    ops.dequantize(compact, torch.bfloat16)
