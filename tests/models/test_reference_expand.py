"""The plan of an expanding dispatch against plain loops over what it is made of."""

import pytest
import torch
from torch import Tensor

from models.fp8 import reference
from tests.models.test_reference_arrivals import SHAPES, definition, route
from tests.models.test_reference_rows import STEPS, naive_rows

ROOMS = [None, 1.5, 1.0, 0.5, 0.0]
"""`max_rows`, as a part of what is needed; half of it loses rows."""


def room_of(needed: int, part: float | None, alignment: int) -> int | None:
    return None if part is None else int(needed * part) // alignment * alignment


def routing(kind: str, gen: torch.Generator) -> tuple[Tensor, int]:
    """Ids of all ranks' tokens, and the experts of a rank, where some get much and some nothing."""
    if kind == "empty experts":
        return route(2, 61, 2, 4, gen) * 3, 6
    if kind == "one expert gets all":
        return torch.full((2, 130, 1), 2), 4
    if kind == "one rank gets all":
        return torch.arange(4).repeat(4, 33, 1), 4
    if kind == "one rank has no tokens":
        ids = route(2, 45, 2, 8, gen)
        ids[1] = -1
        return ids, 4
    if kind == "an expert twice":  # no router chooses so
        return torch.randint(-1, 6, (2, 40, 4), generator=gen), 3
    assert kind == "no tokens"
    return torch.full((2, 9, 2), -1), 3


KINDS = [
    "empty experts", "one expert gets all", "one rank gets all", "one rank has no tokens",
    "an expert twice", "no tokens",
]  # fmt: skip


def check(ids: Tensor, local: int, alignment: int, part: float | None, step: int = 1) -> None:
    for rank in range(len(ids)):
        arrivals = definition(ids, rank, local)
        rows, counts, offsets = naive_rows(arrivals["ids"], local, alignment)
        room = room_of(offsets[-1], part, alignment)
        plan = reference.plan_expand(ids, rank, local, alignment, room, step)
        size = room
        if size is None:
            size = -(-offsets[-1] // step) * step
        rows = [[to if to < size else -1 for to in row] for row in rows]
        copied = [to for row in rows for to in row if to >= 0]
        assert plan.rows.rows.tolist() == rows
        assert plan.rows.num_rows == size
        assert plan.rows.counts.tolist() == counts
        assert plan.rows.offsets.tolist() == [min(end, size) for end in offsets]
        assert int(plan.rows.needed) == offsets[-1]
        for name in ("ids", "ends", "slots", "sent"):
            assert getattr(plan, name).tolist() == arrivals[name]
        assert plan.sources[:, :2].tolist() == [row[:2] for row in arrivals["sources"]]
        assert plan.sources[:, 2:].tolist() == rows
        assert plan.written.tolist() == [
            sum(start <= to < start + count for to in copied)
            for start, count in zip(offsets[:-1], counts, strict=True)
        ]


@pytest.mark.parametrize(("ranks", "tokens", "top_k", "experts"), SHAPES)
@pytest.mark.parametrize("part", ROOMS)
def test_the_plan_is_its_definition(gen, ranks, tokens, top_k, experts, part):
    check(route(ranks, tokens, top_k, experts, gen), experts // ranks, 16, part)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", [128, 1])
@pytest.mark.parametrize("part", ROOMS)
def test_an_uneven_load(gen, kind, alignment, part):
    ids, local = routing(kind, gen)
    check(ids, local, alignment, part)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("part", [None, 0.5])
def test_rows_in_steps(gen, kind, step, part):
    ids, local = routing(kind, gen)
    check(ids, local, 16, part, step)


def test_dtypes(gen):
    plan = reference.plan_expand(route(2, 20, 2, 4, gen), 1, 2, 128, 512)
    for name in ("sources", "ends", "slots", "sent", "written"):
        assert getattr(plan, name).dtype is torch.int32, name
    for tensor in (plan.ids, plan.rows.rows, plan.rows.counts, plan.rows.offsets, plan.rows.needed):
        assert tensor.dtype is torch.int64


def test_other_ids_are_refused():
    with pytest.raises(ValueError, match=r"int64 \[W, T, k\]"):
        reference.plan_expand(torch.zeros(2, 3, 4, dtype=torch.int32), 0, 1)
