"""The plan of arrivals against its definition, one token after the other."""

import pytest
import torch
from torch import Tensor

from models.fp8 import reference
from models.fp8.reference.plan_arrivals import Arrivals


def route(ranks: int, tokens: int, top_k: int, experts: int, gen: torch.Generator) -> Tensor:
    """Ids [W, T, k], none twice for a token; some ranks have fewer tokens than others."""
    ids = torch.rand(ranks, tokens, experts, generator=gen).argsort(2)[:, :, :top_k].contiguous()
    for rank in range(1, ranks):
        ids[rank, tokens - rank * tokens // (2 * ranks) :] = -1
    return ids


def definition(ids: Tensor, rank: int, local: int) -> dict[str, list]:
    ranks, tokens, top_k = ids.shape
    first = rank * local
    come: list[tuple[list[int], list[int]]] = []
    others: list[tuple[list[int], list[int]]] = []
    ends = []
    slots = [[-1] * top_k for _ in range(tokens)]
    sent = [0] * ranks
    for sender in range(ranks):
        for token in range(tokens):
            experts = ids[sender, token].tolist()
            here = [e - first if first <= e < first + local else -1 for e in experts]
            places = [place for place, e in enumerate(here) if e >= 0]
            number, last = sender * tokens + token, max(places, default=0)
            row = (here, [number, sender * top_k + last] + [-1] * top_k)
            (come if places else others).append(row)
            for to in range(ranks):
                at = [place for place, e in enumerate(experts) if e >= 0 and e // local == to]
                if sender == rank and at:
                    slots[token][at[-1]] = rank * tokens + sent[to]
                    sent[to] += 1
        ends.append(len(come))
    rows = come + others
    return {
        "ids": [row[0] for row in rows],
        "sources": [row[1] for row in rows],
        "ends": ends,
        "slots": slots,
        "sent": sent,
    }


SHAPES = [
    # ranks, tokens, top_k, experts
    (2, 37, 2, 4),
    (4, 50, 3, 8),
    (3, 1, 2, 6),
    (8, 20, 8, 16),
    (2, 300, 1, 2),
    (4, 140, 2, 4),  # an expert each
    (8, 20, 16, 32),  # few experts, many places
    (2, 0, 2, 4),
]


def as_lists(plan: Arrivals) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in vars(plan).items()}


@pytest.mark.parametrize(("ranks", "tokens", "top_k", "experts"), SHAPES)
def test_the_plan_is_its_definition(gen, ranks, tokens, top_k, experts):
    ids, local = route(ranks, tokens, top_k, experts, gen), experts // ranks
    for rank in range(ranks):
        got = reference.plan_arrivals(ids, rank, local)
        assert as_lists(got) == definition(ids, rank, local)
        assert got.ids.dtype is torch.int64
        for name in ("sources", "ends", "slots", "sent"):
            assert getattr(got, name).dtype is torch.int32, name


def test_all_ranks_come_to_plans_that_fit(gen):
    """What one sends to another is what that one waits for, in the places it was given."""
    ranks, tokens, top_k, local = 4, 40, 4, 3
    ids = route(ranks, tokens, top_k, ranks * local, gen)
    plans = [reference.plan_arrivals(ids, rank, local) for rank in range(ranks)]
    for to, plan in enumerate(plans):
        starts = [0, *plan.ends.tolist()]
        for sender in range(ranks):
            rows = slice(starts[sender], starts[sender + 1])
            assert rows.stop - rows.start == int(plans[sender].sent[to])
            for at, number in enumerate(plan.sources[rows, 0].tolist()):
                token = number - sender * tokens
                place = int(plan.sources[rows, 1][at]) - sender * top_k
                assert int(ids[sender, token, place]) // local == to
                assert int(plans[sender].slots[token, place]) == sender * tokens + at


def test_other_ids_are_refused():
    with pytest.raises(ValueError, match=r"int64 \[W, T, k\]"):
        reference.plan_arrivals(torch.zeros(2, 3, 4, dtype=torch.int32), 0, 1)
    with pytest.raises(ValueError, match=r"got torch.int64 \[3, 4\]"):
        reference.plan_arrivals(torch.zeros(3, 4, dtype=torch.int64), 0, 1)
