"""TransformerEngine's operations against the reference: bits where they say so, else a bound."""

from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from models.fp8 import linear, reference
from models.fp8.linear import AnyLinear
from models.fp8.tensor import BLOCK, BlockScaledTensor, Layout, ceil_div, relayout

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def te() -> ModuleType:
    pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed")
    from models.fp8 import te

    return te


@pytest.fixture(params=["one GEMM an expert", "one for all"])
def te_linear(te, request) -> AnyLinear:
    """TransformerEngine's linear layer, the old way and that of a newer cuBLAS."""
    if request.param == "one GEMM an expert":
        return te.TELinear(reference)
    from models.fp8 import te_grouped

    if not te_grouped.is_supported():
        pytest.skip(f"cuBLAS {te.cublas_version()} multiplies no groups of FP8 blocks")
    return te_grouped.TEGroupedLinear(reference)


def quantize_columns(x: Tensor, te: ModuleType) -> SimpleNamespace:
    """TransformerEngine's kernel for blocks of 128 x 1, as `TELinear` calls it an expert a time."""
    q = te.tex.quantize(x, te._quantizer(rowwise=False, columnwise=True))
    scale_inv = q._columnwise_scale_inv
    scale_inv[:, x.shape[1] :].zero_()  # what rounds up to four is left as it was
    return SimpleNamespace(data=q._columnwise_data, scale_inv=scale_inv)


def quantize_weights(w: Tensor, te: ModuleType) -> SimpleNamespace:
    """TransformerEngine's kernel for blocks of 128 x 128, all experts of `w [E, N, K]` at once."""
    q = te.tex.quantize(w.flatten(0, 1), te._quantizer(rowwise=True, columnwise=False, dims=2))
    scales = q._rowwise_scale_inv[:, : ceil_div(w.shape[2], BLOCK)].contiguous()
    return SimpleNamespace(
        data=q._rowwise_data.view(w.shape), scale_inv=scales.view(len(w), w.shape[1] // BLOCK, -1)
    )


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values whose size differs from row to row, over 2^16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    size = torch.randint(-8, 9, (*shape[:-1], 1), generator=generator)
    return (x * torch.exp2(size.float())).to(dtype)


def special(dtype: torch.dtype) -> Tensor:
    """One block a row, each with something that a kernel may treat apart."""
    inf, nan, largest = float("inf"), float("nan"), torch.finfo(dtype).max
    rows = [
        [0.0, -0.0],
        [inf, 1.0, -500.0],
        [-inf, inf, 3e38],
        [nan, 1.0, -0.3],
        [nan] * 128,
        [nan, 0.0, inf],
        [nan, 0.0],
        [1e-36, 1e-37, -1e-37],
        [2e-36, 1.4e-36, -1.2e-36],
        [largest, -largest, 1.0],
        [448.0, 449.0, 464.0],
        [1.0, 2.0**-17, 3 * 2.0**-18],
        [1.0, 17 / 16, 19 / 16, 21 / 16],
    ]
    x = torch.zeros(128, 128)
    for row, values in zip(x, rows, strict=False):
        row[: len(values)] = torch.tensor(values)
    return x.to(dtype)


def assert_same(got, want) -> None:
    """The same bytes and scales, both on the CPU or not."""
    data, scale_inv = want.data.view(torch.uint8).cpu(), want.scale_inv.cpu()
    assert got.data.shape == want.data.shape
    assert torch.equal(got.data.view(torch.uint8).cpu(), data)
    assert torch.equal(got.scale_inv.cpu().view(torch.int32), scale_inv.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 128, 130, 1000])
def test_quantize(te, rows, dtype):
    x = normal(rows, 384, dtype=dtype)
    got = te.quantize(x.cuda(), Layout.GEMM_READY)
    assert_same(got, reference.quantize(x, Layout.GEMM_READY))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_special_values(te, dtype):
    x = special(dtype)
    assert_same(te.quantize(x.cuda(), Layout.GEMM_READY), reference.quantize(x, Layout.GEMM_READY))
    x = x.t().contiguous()
    assert_same(
        quantize_columns(x.cuda(), te),
        reference.quantize_columns(x, Layout.GEMM_READY),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [128, 640])
def test_quantize_columns(te, rows, dtype):
    x = normal(rows, 384, dtype=dtype)
    got = quantize_columns(x.cuda(), te)
    assert_same(got, reference.quantize_columns(x, Layout.GEMM_READY))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_weights(te, dtype):
    w = torch.stack([normal(256, 384, seed=e, dtype=dtype) for e in range(3)])
    w[1, :128, :128] = special(dtype)
    w[2, 128:, 256:] = 0
    assert_same(quantize_weights(w.cuda(), te), reference.quantize_weights(w))


def test_quantize_refuses_a_layout_that_would_be_a_relayout(te):
    with pytest.raises(ValueError, match="GEMM_READY scales only, asked for COMPACT"):
        te.quantize(normal(128, 128).cuda(), Layout.COMPACT)


def compact(rows: int, cols: int) -> BlockScaledTensor:
    return reference.quantize(normal(rows, cols).cuda(), Layout.COMPACT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 130])
def test_dequantize(te, rows, dtype):
    x = compact(rows, 384)
    got, want = te.dequantize(x, dtype), reference.dequantize(x, dtype)
    assert got.shape == want.shape
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="needs COMPACT"):
        te.dequantize(relayout(x, Layout.GEMM_READY), dtype)


def plan(received: int, alignment: int = 128) -> reference.RowMap:
    """A random plan for 6 experts, of which number 2 gets nothing."""
    generator = torch.Generator().manual_seed(received)
    ids = torch.rand(received, 8, generator=generator).argsort(1)[:, :3]
    ids = torch.where((ids == 2) | (ids > 5), -1, ids)
    ids[:, 0] = torch.where((ids < 0).all(1), 0, ids[:, 0])  # what arrives is for somebody here
    return reference.plan_rows(ids.cuda(), 6, alignment)


@pytest.mark.parametrize("received", [0, 1, 77, 1024])
def test_permute(te, received):
    row_map = plan(received)
    x = compact(received, 384)
    assert_same(te.permute_scaled(x, row_map), reference.permute_scaled(x, row_map))
    with pytest.raises(ValueError, match="needs COMPACT"):
        te.permute_scaled(relayout(x, Layout.GEMM_READY), row_map)
    with pytest.raises(ValueError, match="permutes to COMPACT scales, asked for GEMM_READY"):
        te.permute_scaled(x, row_map, Layout.GEMM_READY)
    row_map = plan(received, alignment=16)
    tokens = normal(received, 384).cuda()
    assert torch.equal(te.permute(tokens, row_map), reference.permute(tokens, row_map))


def test_permute_has_room_where_nothing_arrives(te):
    row_map = reference.plan_rows(torch.empty(0, 3, dtype=torch.int64).cuda(), 6, 128, 512)
    x, tokens = compact(0, 384), normal(0, 384).cuda()
    assert_same(te.permute_scaled(x, row_map), reference.permute_scaled(x, row_map))
    assert torch.equal(te.permute(tokens, row_map), reference.permute(tokens, row_map))
    assert len(te.permute(tokens, row_map)) == 512


@pytest.mark.parametrize("received", [0, 1, 77, 1024])
def test_unpermute(te, received):
    """Sums in another order: off by a few float32 roundings, and then by one to bfloat16."""
    row_map = plan(received)
    y = normal(row_map.num_rows, 384).cuda()
    got, want = te.unpermute(y, row_map), reference.unpermute(y.double(), row_map)
    size = reference.unpermute(y.double().abs(), row_map)
    assert got.dtype == y.dtype
    assert got.shape == want.shape
    assert ((got - want).abs() <= 2**-8 * want.abs() + 2**-21 * size).all()


@pytest.mark.parametrize("counts", [[128, 0, 384, 256], [0, 0, 0, 128], [512], [0, 0]])
def test_grouped_linear(te_linear, counts):
    """fprop, dgrad and wgrad against the same quantized operands, multiplied in float32.

    The bytes are the same (see above), so what differs is how products are summed. Tensor cores
    keep some 14 bits of a sum while they add 128 products, relative to the largest, and what they
    hand over is added in float32: within 2^-10 of the sum of magnitudes, and mostly far within.
    Rounding to bfloat16 adds at most 2^-8 of a value, and some 1.5e-3 to the norm of all errors,
    which should be little more than that.
    """
    experts, n, k = len(counts), 256, 384
    rows = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0).cuda()
    x, dy = normal(rows, k, seed=1).cuda(), normal(rows, n, seed=2).cuda()
    w = torch.stack([normal(n, k, seed=3 + e) for e in range(experts)]).cuda()

    dirty(y_bytes=4 * rows * k, w_bytes=8 * experts * n * k)
    weights, turned = te_linear.prepare_weights(w, w.dtype)
    y, x_kept = te_linear.forward(x, weights, offsets, x.dtype)
    dx, dy_kept = te_linear.forward(dy, turned, offsets, dy.dtype)
    dw = te_linear.wgrad(dy_kept, x_kept, offsets, torch.bfloat16)

    squares, transposed = linear.Fp8Linear(reference).prepare_weights(w, w.dtype)
    want_y, want_x_kept = exact(reference.grouped_gemm, x, squares, offsets)
    want_dx, want_dy_kept = exact(reference.grouped_gemm, dy, transposed, offsets)
    want_dw = reference.grouped_gemm_wgrad(want_dy_kept, want_x_kept, offsets, torch.float32)

    size_y = magnitudes(x, squares, offsets)
    size_dx = magnitudes(dy, transposed, offsets)
    size_dw = reference.grouped_mm_wgrad(
        want_dy_kept.float32().t().abs(), want_x_kept.float32().t().abs(), offsets, torch.float32
    )
    for got, want, size in ((y, want_y, size_y), (dx, want_dx, size_dx), (dw, want_dw, size_dw)):
        assert got.dtype == torch.bfloat16
        assert got.shape == want.shape
        error = (got.float() - want).abs()
        assert (error <= 2**-8 * want.abs() + 2**-10 * size).all()
        if want.numel():
            assert error.norm() <= 3e-3 * want.norm()
    for e, count in enumerate(counts):
        assert count or not dw[e].any(), "an expert without rows has no gradient"
    assert x_kept.nbytes == want_x_kept.nbytes


def test_rows_after_the_last_expert_change_nothing(te, te_linear):
    """Where room is reserved for P rows: memory after the last row is uninitialized."""
    if te_linear.NEEDS_SEGMENTS_ON_HOST:
        pytest.skip("is given no more than what arrived")
    counts, n, k = [256, 0, 128], 256, 384
    real = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0).cuda()
    w = torch.stack([normal(n, k, seed=3 + e) for e in range(len(counts))]).cuda()
    results = []
    for behind in (0, 128, 640):
        x, dy = (
            torch.cat([normal(real, width, seed=width).cuda(), w.new_full((behind, width), value)])
            for width, value in ((k, float("nan")), (n, float("inf")))
        )
        weights, turned = te_linear.prepare_weights(w, w.dtype)
        y, x_kept = te_linear.forward(x, weights, offsets, x.dtype)
        dx, dy_kept = te_linear.forward(dy, turned, offsets, dy.dtype)
        dw = te_linear.wgrad(dy_kept, x_kept, offsets, torch.bfloat16)
        assert len(y) == len(dx) == real + behind
        results.append((y[:real], dx[:real], dw))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def dirty(y_bytes: int, w_bytes: int) -> None:
    """Leave NaN in the memory that is given out next, so that what is not written shows."""
    for size in (y_bytes, w_bytes):
        torch.full((max(size // 4, 1),), float("nan"), device="cuda")


def exact(gemm, x: Tensor, w, offsets: Tensor) -> tuple[Tensor, BlockScaledTensor]:
    """What `linear.Fp8Linear.forward` computes, its result not rounded."""
    y = gemm(reference.quantize(x, Layout.GEMM_READY), w, offsets, torch.float32)
    return y, reference.quantize_columns(x, Layout.GEMM_READY)


def magnitudes(x: Tensor, w, offsets: Tensor) -> Tensor:
    """The sum of the magnitudes of the products behind each value of a result."""
    values = reference.quantize(x, Layout.COMPACT).float32().abs()
    return reference.grouped_mm(values, w.float32().abs(), offsets)
