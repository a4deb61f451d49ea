"""SwiGLU: within one unit in the last place of the reference; what is fused, bit for bit."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from models.fp8 import kernels, overflow, reference
from models.fp8.tensor import E4M3, BlockScaledTensor, Layout
from tests.models.test_kernels_numbers import DEVICES, assert_same_bits, generator, set_up

pytestmark = pytest.mark.parametrize("device", DEVICES)

SHAPES = [(70, 256), (1, 128), (33, 768), (0, 128)]
ODD_SHAPES = [(5, 96), (40, 300), (3, 1)]


@pytest.fixture(autouse=True)
def prepared(monkeypatch, request):
    set_up(monkeypatch, request.node.callspec.params["device"])


def problem(shape, dtype, device):
    """da, h and probs, values of all sizes and signs among them, and some rows of padding."""
    gen = generator()
    rows, cols = shape
    size = torch.exp2(torch.randint(-12, 6, (rows, 1), generator=gen).float())
    h = torch.randn(rows, 2 * cols, generator=gen) * size
    da = torch.randn(rows, cols, generator=gen) / size
    probs = torch.rand(rows, generator=gen)
    probs[::5] = 0
    h[::5] = 0
    return da.to(dtype).to(device), h.to(dtype).to(device), probs.to(device)


def assert_within_one_unit(got, expected):
    """Neighbours in the order of the dtype's numbers; in float32, up to 64 of them apart.

    (`exp(x)` is computed as a power of two, so the rounding of `x / log(2)` is an error of
    `|x| / 2` units.)
    Values below 2^-100 are left out: close to the end of float32's range the GPU's fast exponential
    and division give zero where the exact ones do not.
    """
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    integer, units = {
        torch.bfloat16: (torch.int16, 1), torch.float32: (torch.int32, 64)
    }[got.dtype]  # fmt: skip

    def rank(x):
        i = x.view(integer).long()
        return torch.where(i < 0, -(i & torch.iinfo(integer).max), i)

    near = (rank(got) - rank(expected)).abs() <= units
    assert (near | ((got - expected).abs() < 2.0**-100)).all()


def check_backward(dh, dprobs, da, h, probs):
    expected_dh, expected_dprobs = reference.swiglu_backward(da, h, probs)
    if h.dtype is torch.bfloat16:
        assert_within_one_unit(dh, expected_dh)
    else:  # 1 + gate * (1 - s) cancels near its zero, so a bound on the value alone does not hold
        bound = 2.0**-20 * torch.cat([da * h.chunk(2, 1)[1]] * 2, 1).abs() * probs[:, None]
        assert ((dh - expected_dh).abs() <= bound + 2.0**-16 * expected_dh.abs() + 1e-30).all()
    gate, up = h.float().chunk(2, 1)
    magnitude = (da.float() * torch.nn.functional.silu(gate) * up).abs().sum(1)
    assert dprobs.dtype is torch.float32
    assert ((dprobs - expected_dprobs).abs() <= 1e-5 * magnitude + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES)
def test_swiglu(device, dtype, shape):
    _, h, probs = problem(shape, dtype, device)
    assert_within_one_unit(kernels.swiglu(h, probs), reference.swiglu(h, probs))


def test_swiglu_of_every_bfloat16_gate(device):
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite()].view(-1, 128).to(device)
    h = torch.cat([gate, torch.ones_like(gate)], 1)
    probs = torch.ones(h.shape[0], device=device)
    assert_within_one_unit(kernels.swiglu(h, probs), reference.swiglu(h, probs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_quantize_is_quantize_of_swiglu(device, dtype, layout, shape):
    _, h, probs = problem(shape, dtype, device)
    if h.numel():
        h[0, 0] = torch.nan
        h[-1, -1] = torch.inf
    got = kernels.swiglu_quantize(h, probs, layout)
    assert_same_bits(got, kernels.quantize(kernels.swiglu(h, probs), layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES)
def test_swiglu_backward(device, dtype, shape):
    da, h, probs = problem(shape, dtype, device)
    dh, dprobs = kernels.swiglu_backward(da, h, probs)
    check_backward(dh, dprobs, da, h, probs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_backward_quantize_is_all_of_them(device, dtype, layout, shape):
    da, h, probs = problem(shape, dtype, device)
    dh, dh_scaled, dprobs, a = kernels.swiglu_backward_quantize(da, h, probs, layout)
    check_backward(dh, dprobs, da, h, probs)
    assert_same_bits(dh_scaled, kernels.quantize(dh, layout))
    assert_same_bits(a, kernels.swiglu(h, probs))
    assert_same_bits(dh, kernels.swiglu_backward(da, h, probs)[0])


def written(t):
    """Which rows of a tensor that was `torch.empty` have been written."""
    if t.dtype is E4M3:
        return (t.view(torch.uint8) != 0xFF).any(1)
    return ~t.isnan() if t.dim() == 1 else ~t.isnan().all(1)


@pytest.mark.parametrize("end", [0, 1, 32, 40, 69, 70])
def test_rows_after_the_last_expert_are_left_alone(device, end):
    """Not read, so whatever is there changes nothing and is not noted; not written."""
    da, h, probs = problem((70, 256), torch.bfloat16, device)
    clean = [t.clone() for t in (da, h, probs)]
    for t in (da, h, probs):
        t[end:] = torch.inf
    offsets = torch.tensor([0, end // 2, end], device=device)
    note = overflow.note_on(h.device)
    for layout in Layout:
        for name, wanted in (
            ("swiglu", 1), ("swiglu_quantize", 1),
            ("swiglu_backward", 0), ("swiglu_backward_quantize", 0),
        ):  # fmt: skip
            more = (layout,) if name.endswith("quantize") else ()
            note.zero_()
            got = getattr(kernels, name)(*(da, h, probs)[wanted:], *more, offsets)
            assert not note, name
            want = getattr(kernels, name)(*clean[wanted:], *more)
            of_reference = getattr(reference, name)(*(da, h, probs)[wanted:], *more, offsets)
            assert not note, "nor by the reference"
            for one, other, defined in zip(
                *(t if isinstance(t, tuple) else (t,) for t in (got, want, of_reference)),
                strict=True,
            ):
                if isinstance(one, BlockScaledTensor):
                    scales = [t.row_scales[:end] for t in (one, other)]
                    assert torch.equal(*scales)
                    one, other, defined = one.data, other.data, defined.data
                assert_same_bits(one[:end], other[:end])
                assert not written(one)[end:].any(), name
                assert not defined[end:].view(torch.uint8).any(), "zeros, by the reference"


def test_refusals(device):
    h, probs = torch.zeros(4, 256, device=device), torch.zeros(4, device=device)
    with pytest.raises(TypeError, match="float32"):
        kernels.swiglu(h.half(), probs)
    with pytest.raises(TypeError, match="float32"):
        kernels.swiglu(h, probs.bfloat16())
    with pytest.raises(ValueError, match="2F"):
        kernels.swiglu(h[:, :255], probs)
    with pytest.raises(ValueError, match="probs"):
        kernels.swiglu(h, probs[:3])
    with pytest.raises(ValueError, match="da"):
        kernels.swiglu_backward(h, h, probs)
    with pytest.raises(ValueError, match="multiple of 128"):
        kernels.swiglu_quantize(h[:, :200], probs, Layout.COMPACT)


def test_infinities_are_noted(device):
    """By each kernel what the reference notes, and nothing of padding."""
    note = overflow.note_on(torch.zeros(0, device=device).device)
    # Nothing but the gradient of `up` overflows.
    da, h, probs = problem((70, 256), torch.bfloat16, device)
    h[9, :], da[9, 3], probs[9] = 0, 3e38, 1
    h[9, 3] = 300
    for operations in (reference, kernels):
        note.zero_()
        operations.swiglu(h, probs)
        assert not note
        operations.swiglu_backward(da, h, probs)
        assert note
    for row, prob, infinite in ((0, 1.0, False), (37, 0.0, True), (37, 0.5, True), (5, 1e-3, True)):
        da, h, probs = problem((70, 256), torch.bfloat16, device)
        probs[row] = prob
        h[row], da[row] = 1, 1
        if infinite:
            h[row, 300], da[row, 200] = torch.inf, torch.inf
        for name, *arguments in (
            ("swiglu", h, probs),
            ("swiglu_quantize", h, probs, Layout.GEMM_READY),
            ("swiglu_backward", da, h, probs),
            ("swiglu_backward_quantize", da, h, probs, Layout.COMPACT),
        ):
            for operations in (reference, kernels):
                note.zero_()
                getattr(operations, name)(*arguments)
                assert bool(note) == (infinite and prob != 0), (name, row, prob)
