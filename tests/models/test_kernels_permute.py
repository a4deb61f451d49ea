"""The plan on the device, permute and unpermute, against the reference bit for bit."""

import functools
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from models.fp8 import kernels, reference
from models.fp8.kernels.plan_rows import inverse, most_rows, plan_rows, row_experts
from models.fp8.tensor import BlockScaledTensor, Layout
from tests.models.test_kernels_numbers import DEVICES, assert_same_bits, generator, set_up
from tests.models.test_reference_rows import STEPS

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def prepared(monkeypatch, request):
    set_up(monkeypatch, request.node.callspec.params["device"])


def routing(kind, device):
    """Local expert ids `[R, T]`, and how many experts there are."""
    gen = generator()
    if kind == "random":
        ids, experts = torch.randint(-1, 5, (300, 3), generator=gen), 5
    elif kind == "many experts":  # one of them gets most
        ids, experts = torch.randint(-1, 130, (100, 2), generator=gen), 130
        ids[torch.rand(100, 2, generator=gen) < 0.6] = 77
    elif kind == "empty experts":
        ids, experts = torch.randint(0, 2, (50, 2), generator=gen) * 3, 6
    elif kind == "one expert gets all":
        ids, experts = torch.full((130, 1), 2), 4
    elif kind == "exactly one block":
        ids, experts = torch.zeros(128, 1, dtype=torch.int64), 2
    elif kind == "none for us":
        ids, experts = torch.full((10, 2), -1), 3
    elif kind == "one expert":
        ids, experts = torch.randint(-1, 1, (33, 8), generator=gen), 1
    else:
        assert kind == "no rows"
        ids, experts = torch.zeros(0, 2, dtype=torch.int64), 3
    return ids.to(device), experts


KINDS = [
    "random", "many experts", "empty experts", "one expert gets all", "exactly one block",
    "none for us", "one expert", "no rows",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", [128, 16, 1])
def test_plan_rows(device, kind, alignment):
    ids, experts = routing(kind, device)
    got, expected = plan_rows(ids, experts, alignment), reference.plan_rows(ids, experts, alignment)
    for name in ("rows", "counts", "offsets", "needed"):
        assert_same_bits(getattr(got, name).to(torch.int32), getattr(expected, name).int())
        assert getattr(got, name).dtype is torch.int64
    assert got.num_rows == expected.num_rows
    assert torch.equal(got.source, inverse(expected))
    slots = ids.flatten()
    for row, slot in enumerate(got.source.tolist()):
        assert slot == -1 or got.rows.flatten()[slot] == row
    assert (got.source >= 0).sum() == (slots >= 0).sum()
    assert got.num_rows <= most_rows(ids.numel(), experts, alignment)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_without_waiting(device, kind):
    """With a bound for the rows the plan is the same, and nothing is written behind it."""
    ids, experts = routing(kind, device)
    exact = plan_rows(ids, experts)
    size = most_rows(ids.numel(), experts) + 5
    bounded = plan_rows(ids, experts, max_rows=size)
    assert bounded.num_rows == size
    for name in ("rows", "counts", "offsets", "needed"):
        assert torch.equal(getattr(bounded, name), getattr(exact, name))
    assert torch.equal(bounded.source[: exact.num_rows], exact.source)
    assert (bounded.source[exact.num_rows :] == -1).all()
    assert bounded.source.shape == (size,)

    x = torch.randn(ids.shape[0], 128, generator=generator()).to(device)
    permuted = kernels.permute(x, bounded)
    assert torch.equal(permuted[: exact.num_rows], kernels.permute(x, exact))
    assert permuted[exact.num_rows :].isnan().all(), "no memory is moved for what nobody reads"
    assert_same_bits(kernels.unpermute(permuted, bounded), reference.unpermute(permuted, bounded))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_plan_rows_in_steps(device, kind, step):
    """P is rounded up, and rows behind the last expert's are not written."""
    ids, experts = routing(kind, device)
    got, want = (of.plan_rows(ids, experts, 16, step=step) for of in (kernels, reference))
    for name in ("rows", "counts", "offsets", "needed", "num_rows"):
        assert torch.equal(*(torch.as_tensor(getattr(one, name)) for one in (got, want)))
    assert torch.equal(got.source, inverse(want))
    x = torch.randn(ids.shape[0], 128, generator=generator()).to(device)
    end = int(got.offsets[-1])
    permuted = kernels.permute(x, got)
    assert_same_bits(permuted[:end], reference.permute(x, want)[:end])
    assert permuted[end:].isnan().all()
    weights = torch.rand(ids.shape, generator=generator()).to(device)
    assert_same_bits(kernels.permute_probs(weights, got), reference.permute_probs(weights, want))
    y = torch.randn(got.num_rows, 128, generator=generator()).to(device)
    y[end:] = torch.nan
    assert_same_bits(kernels.unpermute(y, got), reference.unpermute(y, want))
    bounded = kernels.plan_rows(ids, experts, 16, max_rows=640, step=step)
    assert bounded.num_rows == len(bounded.source) == 640


def test_plan_with_too_little_room_stays_in_bounds(device):
    ids, experts = routing("random", device)
    exact = plan_rows(ids, experts)
    size = exact.num_rows - 200
    plan = plan_rows(ids, experts, max_rows=size)
    assert torch.equal(plan.rows, torch.where(exact.rows < size, exact.rows, -1))
    assert torch.equal(plan.offsets, exact.offsets.clamp(max=size))
    assert torch.equal(plan.source, exact.source[:size])
    want = reference.plan_rows(ids, experts, max_rows=size)
    for name in ("rows", "counts", "offsets", "needed", "num_rows"):
        assert torch.equal(*(torch.as_tensor(getattr(one, name)) for one in (plan, want)))


@pytest.mark.parametrize("bad", [-2, 3, 4, 2**40])
def test_plan_rows_refuses_unknown_experts(device, bad):
    with pytest.raises(ValueError, match="expert ids"):
        plan_rows(torch.tensor([[0, bad]], device=device), 3)
    plan = plan_rows(torch.tensor([[0, bad]], device=device), 3, max_rows=256)
    assert plan.rows.tolist() == [[0, -1]]
    with pytest.raises(ValueError, match="int64"):
        plan_rows(torch.tensor([[0]], dtype=torch.int32, device=device), 3)


def skip_if_slow(device, kind, cols):
    """Triton's interpreter takes many columns of the other kinds only, which have fewer rows."""
    if device == "cpu" and cols > 384 and kind in ("random", "many experts"):
        pytest.skip("up to a minute in the interpreter")


@functools.cache
def plans(kind, device):
    """The same plan, from the device and from the reference."""
    ids, experts = routing(kind, device)
    return ids, (plan_rows(ids, experts), reference.plan_rows(ids, experts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "cols"), [
    (torch.bfloat16, 256), (torch.bfloat16, 40), (torch.float32, 300), (torch.uint8, 2304),
])  # fmt: skip
def test_permute(device, kind, dtype, cols):
    skip_if_slow(device, kind, cols)
    ids, both = plans(kind, device)
    x = (torch.randn(ids.shape[0], cols, generator=generator()) * 50).to(device).to(dtype)
    if x.numel() and x.is_floating_point():
        x[0, 0] = torch.nan
    for plan in both:
        got, expected = kernels.permute(x, plan), reference.permute(x, plan)
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        assert got.dtype is dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("cols", [128, 384, 4096, 7168])
def test_permute_scaled(device, kind, layout, cols):
    skip_if_slow(device, kind, cols)
    ids, both = plans(kind, device)
    rows = torch.randn(ids.shape[0], cols, generator=generator()) * torch.arange(1, cols + 1)
    x = reference.quantize(rows.to(device), Layout.COMPACT)
    for plan in both:
        got = kernels.permute_scaled(x, plan, layout)
        assert_same_bits(got, reference.permute_scaled(x, plan, layout))
        assert got.layout is layout


@pytest.mark.parametrize("layout", Layout)
def test_permute_scaled_to_a_number_of_rows_that_is_rounded_up(device, layout):
    """GEMM_READY rows are rounded up to four; plans of other alignments need not be."""
    ids = torch.tensor([[0, 1], [1, 2], [2, -1]] * 3, device=device)
    plan = reference.plan_rows(ids, 3, 1)
    assert plan.num_rows == 15
    x = reference.quantize(torch.randn(ids.shape[0], 256).to(device), Layout.COMPACT)
    got = kernels.permute_scaled(x, plan, layout)
    assert_same_bits(got, reference.permute_scaled(x, plan, layout))


@pytest.mark.parametrize("kind", KINDS)
def test_row_experts(device, kind):
    ids, experts = routing(kind, device)
    offsets = reference.plan_rows(ids, experts).offsets
    rows = int(offsets[-1]) + 5
    expected = [-1] * rows
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        expected[start:end] = [expert] * (end - start)
    assert row_experts(offsets, rows).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_probs(device, kind):
    ids, both = plans(kind, device)
    weights = torch.rand(ids.shape, generator=generator()).to(device)
    for plan in both:
        p = kernels.permute_probs(weights, plan)
        assert_same_bits(p, reference.permute_probs(weights, plan))
        p = p + 1  # padding too, which must not come back
        assert_same_bits(kernels.unpermute_probs(p, plan), reference.unpermute_probs(p, plan))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cols", [40, 128, 384, 2048])
def test_unpermute(device, kind, dtype, cols):
    skip_if_slow(device, kind, cols)
    _, both = plans(kind, device)
    for plan in both:
        y = torch.randn(plan.num_rows, cols, generator=generator()).to(dtype).to(device)
        if plan.num_rows:
            y[:, 0] = -0.0
            y[-1] = torch.nan  # padding, mostly: it must not leak into rows without copies
        assert_same_bits(kernels.unpermute(y, plan), reference.unpermute(y, plan))


def test_refusals(device):
    ids = torch.zeros(3, 1, dtype=torch.int64, device=device)
    plan = plan_rows(ids, 1)
    with pytest.raises(ValueError, match="3 rows"):
        kernels.permute(torch.zeros(4, 8, device=device), plan)
    with pytest.raises(ValueError, match="128 rows"):
        kernels.unpermute(torch.zeros(3, 8, device=device), plan)
    with pytest.raises(ValueError, match="4 bytes"):
        kernels.permute(torch.zeros(3, 3, dtype=torch.uint8, device=device), plan)
    x = reference.quantize(torch.zeros(3, 128, device=device), Layout.GEMM_READY)
    with pytest.raises(ValueError, match="COMPACT"):
        kernels.permute_scaled(x, plan)
    x = BlockScaledTensor(x.data[:2], torch.ones(2, 1, device=device), Layout.COMPACT)
    with pytest.raises(ValueError, match="3 rows"):
        kernels.permute_scaled(x, plan)
