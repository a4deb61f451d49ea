"""The reference's plan of rows, permute and unpermute against plain loops."""

import pytest
import torch

from models.fp8 import reference as ops
from models.fp8.tensor import (
    BLOCK,
    BlockScaledTensor,
    ceil_div,
    relayout,
)
from tests.support.numbers import COMPACT, E4M3, GEMM_READY, NAN, assert_same, bits, spread_randn


def naive_rows(ids, experts, alignment):
    rows = [[-1] * len(row) for row in ids]
    offsets, counts = [0], []
    for e in range(experts):
        position = offsets[-1]
        for r, row in enumerate(ids):
            for t, expert in enumerate(row):
                if expert == e:
                    rows[r][t] = position
                    position += 1
        counts.append(position - offsets[-1])
        offsets.append(offsets[-1] + ceil_div(counts[-1], alignment) * alignment)
    return rows, counts, offsets


def routing(kind, gen):
    """Local expert ids, and how many experts there are."""
    if kind == "random":
        return torch.randint(-1, 5, (300, 3), generator=gen), 5
    if kind == "empty experts":
        return torch.randint(0, 2, (50, 2), generator=gen) * 3, 6
    if kind == "one expert gets all":
        return torch.full((130, 1), 2), 4
    if kind == "exactly one block":
        return torch.zeros(128, 1, dtype=torch.int64), 2
    if kind == "none for us":
        return torch.full((10, 2), -1), 3
    if kind == "one token":
        return torch.tensor([[-1, 3]]), 4
    assert kind == "no rows"
    return torch.zeros(0, 2, dtype=torch.int64), 3


KINDS = [
    "random", "empty experts", "one expert gets all", "exactly one block", "none for us",
    "one token", "no rows",
]  # fmt: skip

STEPS = [1, 384, 10_000]
"""What P is rounded up to: nothing, something, and more rows than there are."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", [128, 16, 1])
def test_plan_rows(kind, alignment, gen):
    ids, experts = routing(kind, gen)
    plan = ops.plan_rows(ids, experts, alignment)
    rows, counts, offsets = naive_rows(ids.tolist(), experts, alignment)
    assert plan.rows.tolist() == rows
    assert plan.rows.shape == ids.shape
    assert plan.counts.tolist() == counts
    assert plan.offsets.tolist() == offsets
    assert plan.num_rows == offsets[-1]
    assert {plan.rows.dtype, plan.counts.dtype, plan.offsets.dtype} == {torch.int64}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [-256, -128, 0, 256])
def test_plan_rows_with_a_bound(kind, room, gen):
    """More room is padding at the end; with less, copies beyond it are dropped, and nothing
    else."""
    ids, experts = routing(kind, gen)
    rows, counts, offsets = naive_rows(ids.tolist(), experts, BLOCK)
    size = max(offsets[-1] + room, 0)
    plan = ops.plan_rows(ids, experts, max_rows=size)
    assert plan.num_rows == size
    assert plan.rows.tolist() == [[r if r < size else -1 for r in row] for row in rows]
    assert plan.counts.tolist() == counts  # of what was asked for
    assert plan.offsets.tolist() == [min(offset, size) for offset in offsets]
    assert plan.needed == offsets[-1]
    x = torch.randn(ids.shape[0], 8, generator=gen)
    fits = (plan.rows >= 0).sum(1, keepdim=True)
    assert torch.equal(ops.unpermute(ops.permute(x.round(), plan), plan), x.round() * fits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_plan_rows_in_steps(kind, step, gen):
    """P alone is rounded up; rows behind the last expert's are as padding is."""
    ids, experts = routing(kind, gen)
    rows, counts, offsets = naive_rows(ids.tolist(), experts, 16)
    plan = ops.plan_rows(ids, experts, 16, step=step)
    assert plan.num_rows % step == 0
    assert 0 <= plan.num_rows - offsets[-1] < step
    assert plan.rows.tolist() == rows
    assert plan.counts.tolist() == counts
    assert plan.offsets.tolist() == offsets
    assert plan.needed == offsets[-1]
    x = torch.randn(ids.shape[0], 8, generator=gen)
    permuted = ops.permute(x, plan)
    assert permuted.shape == (plan.num_rows, 8)
    assert not permuted[offsets[-1] :].any()
    probs = torch.rand(ids.shape, generator=gen) + 1
    assert not ops.permute_probs(probs, plan)[offsets[-1] :].any()
    permuted[offsets[-1] :] = torch.nan
    fits = (plan.rows >= 0).sum(1, keepdim=True)
    assert torch.equal(ops.unpermute(permuted.round(), plan), x.round() * fits)


def test_a_bound_is_not_rounded(gen):
    """With one, which copies are dropped does not depend on the step."""
    ids, experts = routing("random", gen)
    for size in (384, 640):
        plan = ops.plan_rows(ids, experts, max_rows=size, step=512)
        want = ops.plan_rows(ids, experts, max_rows=size)
        assert plan.num_rows == want.num_rows == size
        assert torch.equal(plan.rows, want.rows)


@pytest.mark.parametrize("bad", [-2, 3])
def test_plan_rows_refuses_unknown_experts(bad):
    with pytest.raises(ValueError, match="expert ids"):
        ops.plan_rows(torch.tensor([[0, bad]]), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_permute(kind, gen):
    ids, experts = routing(kind, gen)
    plan = ops.plan_rows(ids, experts)
    x = torch.randn(ids.shape[0], 40, generator=gen)
    q = ops.quantize(spread_randn(gen, ids.shape[0], 300), COMPACT)
    probs = torch.rand(ids.shape, generator=gen)

    expected = torch.zeros(plan.num_rows, 40)
    data = torch.zeros(plan.num_rows, 300, dtype=torch.uint8)
    scales = torch.zeros(plan.num_rows, 3)
    expected_probs = torch.zeros(plan.num_rows)
    for r in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            to = int(plan.rows[r, t])
            if to >= 0:
                expected[to], data[to], scales[to] = x[r], bits(q.data)[r], q.scale_inv[r]
                expected_probs[to] = probs[r, t]

    assert torch.equal(ops.permute(x, plan), expected)
    assert torch.equal(ops.permute(x.bfloat16(), plan), expected.bfloat16())
    compact = BlockScaledTensor(data.view(E4M3), scales, COMPACT)
    assert_same(ops.permute_scaled(q, plan), compact)
    if plan.num_rows:
        ready = ops.permute_scaled(q, plan, GEMM_READY)
        assert_same(ready, relayout(compact, GEMM_READY))
    assert torch.equal(ops.permute_probs(probs, plan), expected_probs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unpermute(kind, dtype, gen):
    ids, experts = routing(kind, gen)
    plan = ops.plan_rows(ids, experts)
    y = torch.randn(plan.num_rows, 24, generator=gen).to(dtype)
    p = torch.randn(plan.num_rows, generator=gen)
    expected = torch.zeros(ids.shape[0], 24)
    expected_probs = torch.zeros(ids.shape)
    for r in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            if plan.rows[r, t] >= 0:
                expected[r] += y[plan.rows[r, t]].float()
                expected_probs[r, t] = p[plan.rows[r, t]]
    assert torch.equal(ops.unpermute(y, plan), expected.to(dtype))
    assert ops.unpermute(y, plan).dtype is dtype
    assert torch.equal(ops.unpermute_probs(p, plan), expected_probs)


def test_unpermute_adds_in_slot_order_and_rounds_once():
    plan = ops.plan_rows(torch.tensor([[2, 1, 0]]), 3, alignment=1)
    y = torch.tensor([[-1e8], [1e8], [1.0]])  # slots: 1, 1e8, -1e8
    assert ops.unpermute(y, plan).item() == 0.0  # (1 + 1e8) - 1e8; another order gives 1
    y = torch.tensor([[2.0**-8], [2.0**-8], [1.0]]).bfloat16()
    assert ops.unpermute(y, plan).item() == 1 + 2.0**-7  # rounded in between: 1


def test_nan_in_another_row_does_not_leak():
    plan = ops.plan_rows(torch.tensor([[0], [-1]]), 1, alignment=1)
    assert ops.unpermute(torch.tensor([[NAN]]), plan)[1].item() == 0
    assert ops.unpermute_probs(torch.tensor([NAN]), plan)[1].item() == 0


def test_what_came_from_nowhere_has_bytes_to_send_back():
    """Where room is reserved and no row has come: dispatch sends tensors as bytes."""
    ids = torch.empty(0, 1, dtype=torch.int64)
    plan = ops.plan_rows(ids, 2, max_rows=256)
    for sent in (
        ops.unpermute(torch.ones(256, 8), plan),
        ops.unpermute_probs(torch.ones(256), plan),
    ):
        assert sent.view(torch.uint8).shape[0] == 0


def test_permute_and_unpermute_are_each_others_transpose(gen):
    """<permute(x), y> = <x, unpermute(y)>: what makes one the backward of the other."""
    ids, experts = routing("random", gen)
    plan = ops.plan_rows(ids, experts)
    x = torch.randint(-4, 5, (300, 8), generator=gen).float()
    y = torch.randint(-4, 5, (plan.num_rows, 8), generator=gen).float()
    assert (ops.permute(x, plan) * y).sum() == (x * ops.unpermute(y, plan)).sum()


def test_rows_of_the_wrong_length(gen):
    plan = ops.plan_rows(torch.zeros(3, 1, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="3 rows"):
        ops.permute(torch.zeros(4, 8), plan)
    with pytest.raises(ValueError, match="128 rows"):
        ops.unpermute(torch.zeros(3, 8), plan)
    with pytest.raises(ValueError, match="COMPACT"):
        ops.permute_scaled(ops.quantize(torch.zeros(3, 128), GEMM_READY), plan)
