"""The quantize kernels against the reference, bit for bit."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from models.fp8 import kernels, reference
from models.fp8.tensor import E4M3, BlockScaledTensor, Layout
from tests.models.test_kernels_numbers import DEVICES, assert_same_bits, generator, set_up

pytestmark = pytest.mark.parametrize("device", DEVICES)

DTYPES = [torch.bfloat16, torch.float32]
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def prepared(monkeypatch, request):
    set_up(monkeypatch, request.node.callspec.params["device"])


def blocks_of_all_sizes(*shape):
    """Normal values, each run of 128 of a size of its own between 2^-140 and 2^120; some zeros."""
    gen = generator()
    x = torch.randn(*shape, generator=gen).double()
    size = torch.randint(-140, 121, (*shape[:-1], -(-shape[-1] // 128)), generator=gen)
    x *= torch.exp2(size.double()).repeat_interleave(128, -1)[..., : shape[-1]]
    return (x * (torch.rand(*shape[:-1], 1, generator=gen) > 0.1)).float()


def awkward_rows(dtype):
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    rows = [
        [0.0], [-0.0, 0.0], [INF, 1.0, -500.0], [-INF, INF, 3.0e38], [NAN, 1.0, -0.3],
        [NAN] * 128, [NAN, 0.0, INF], [NAN, 0.0], [2.0**-133, -(2.0**-133)],
        [tiny, 2.0**-133, -3 * tiny], [1e-36, 1e-37, -1e-38], [1.3e-36, 1.4e-36, 1.2e-36],
        [largest, -largest, 1.0], [448.0, 449.0, 464.0], [1.0, 2.0**-17, 3 * 2.0**-18],
    ]  # fmt: skip
    x = torch.zeros(len(rows), 128)
    for row, values in zip(x, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("shape", [(70, 256), (1, 128), (33, 1152), (0, 256), (3, 0)])
def test_quantize(device, dtype, layout, shape):
    x = blocks_of_all_sizes(*shape).to(dtype).to(device)
    assert_same_bits(kernels.quantize(x, layout), reference.quantize(x, layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", Layout)
def test_quantize_special_values(device, dtype, layout):
    x = awkward_rows(dtype).to(device)
    got = kernels.quantize(x, layout)
    assert_same_bits(got, reference.quantize(x, layout))
    data = got.data.view(torch.uint8)
    assert (data[5] == 0x7F).all()
    assert data[2, :3].tolist() == [0x7E, 0x38, 0xFE]


def test_quantize_every_power_of_two_amax(device):
    """amax = 448 * 2^k and its neighbours: a quotient off by one bit would lose an octave."""
    x = (448 * torch.exp2(torch.arange(-126, 119).double())).float()[:, None]
    x = torch.cat([x, torch.nextafter(x, torch.tensor(INF)), torch.nextafter(x, -x)])
    x = torch.nn.functional.pad(x, (0, 127)).to(device)
    assert_same_bits(kernels.quantize(x, Layout.COMPACT), reference.quantize(x, Layout.COMPACT))


def test_negative_nan(device):
    x = torch.full((1, 128), -1, dtype=torch.int32, device=device).view(torch.float32)
    got = kernels.quantize(x, Layout.COMPACT)
    assert (got.data.view(torch.uint8) == 0x7F).all()


def test_quantize_a_view(device):
    x = torch.randn(128, 256, generator=generator()).to(device)
    assert_same_bits(
        kernels.quantize(x[:, 128:], Layout.COMPACT), reference.quantize(x[:, 128:], Layout.COMPACT)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("shape", [(256, 70), (128, 1), (384, 192), (0, 64)])
def test_quantize_columns(device, dtype, layout, shape):
    x = blocks_of_all_sizes(*shape[::-1]).t().contiguous().to(dtype).to(device)
    assert_same_bits(kernels.quantize_columns(x, layout), reference.quantize_columns(x, layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 128, 256), (1, 384, 128), (0, 128, 128)])
def test_quantize_weights(device, dtype, shape):
    w = torch.randn(*shape, generator=generator())
    if w.numel():
        w[0, :128, :128] = 0
        w[-1, -1, -1] = NAN
        w[-1, 0, -1] = INF
    w = w.to(dtype).to(device)
    assert_same_bits(kernels.quantize_weights(w), reference.quantize_weights(w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 256, 384), (1, 128, 128), (0, 128, 256)])
def test_quantize_weights_both_ways(device, dtype, shape):
    """Rounding to bfloat16 first is part of it: master weights are float32."""
    w = torch.randn(*shape, generator=generator())
    if w.numel():
        w[0, :128, :128] = 0
        w[-1, -1, -1] = NAN
    w = w.to(dtype).to(device)
    for rounded in DTYPES:
        got = kernels.quantize_weights_both_ways(w, rounded)
        want = reference.quantize_weights_both_ways(w, rounded)
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_dequantize(device, dtype, rows):
    x = reference.quantize(blocks_of_all_sizes(rows, 384), Layout.COMPACT)
    x = BlockScaledTensor(x.data.to(device), x.scale_inv.to(device), x.layout)
    assert_same_bits(kernels.dequantize(x, dtype), reference.dequantize(x, dtype))


def test_refusals(device):
    with pytest.raises(TypeError, match="float16"):
        kernels.quantize(torch.zeros(2, 128, dtype=torch.float16, device=device), Layout.COMPACT)
    with pytest.raises(ValueError, match="dimensions"):
        kernels.quantize(torch.zeros(128, device=device), Layout.COMPACT)
    with pytest.raises(ValueError, match="multiple of 128"):
        kernels.quantize(torch.zeros(2, 100, device=device), Layout.COMPACT)
    with pytest.raises(ValueError, match="multiple of 128"):
        kernels.quantize_weights(torch.zeros(1, 100, 128, device=device))
    ready = kernels.quantize(torch.zeros(2, 128, device=device), Layout.GEMM_READY)
    with pytest.raises(ValueError, match="COMPACT"):
        kernels.dequantize(ready, torch.bfloat16)
    assert ready.data.dtype is E4M3
