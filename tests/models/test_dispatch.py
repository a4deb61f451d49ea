"""All-to-all dispatch against the definition: every token at every rank that has its experts."""

import pytest
import torch
import torch.distributed as dist

from models.fp8.tensor import E4M3
from models.moe.dispatch.all_to_all import AllToAll
from tests.support.ranks import run_ranks

EXPERTS, TOP_K, HIDDEN = 8, 2, 16


def routing(rank: int, tokens: int, seed: int, only: list[int] | None = None):
    """Random routing of one rank's tokens; `only` restricts it to some experts."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    choice = torch.tensor(only if only is not None else range(EXPERTS))
    order = torch.rand(tokens, len(choice), generator=generator).argsort(1)[:, :TOP_K]
    weights = torch.rand(tokens, TOP_K, generator=generator)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    return x, choice[order].view(tokens, TOP_K), weights


def check_dispatch(rank: int, counts: list[int], seed: int, only: list[int] | None) -> None:
    world = dist.get_world_size()
    local = EXPERTS // world
    everyone = [routing(r, counts[r], seed, only) for r in range(world)]
    x, ids, weights = everyone[rank]
    dispatcher = AllToAll(dist.distributed_c10d._get_default_group(), EXPERTS)
    as_bytes = x.to(E4M3)
    (got, got_fp8), got_ids, got_weights, handle = dispatcher.dispatch((x, as_bytes), ids, weights)

    # What must arrive here, by the definition: tokens of rank 0 first, in their order.
    mine = range(rank * local, (rank + 1) * local)
    rows, row_ids, row_weights = [], [], []
    for x_r, ids_r, weights_r in everyone:
        for t in range(len(x_r)):
            here = [int(e) in mine for e in ids_r[t]]
            if any(here):
                rows.append(x_r[t])
                row_ids.append([int(e) - rank * local if int(e) in mine else -1 for e in ids_r[t]])
                row_weights.append(weights_r[t])
    assert len(got) == len(rows)
    if rows:
        assert torch.equal(got, torch.stack(rows))
        assert torch.equal(got_fp8.view(torch.uint8), torch.stack(rows).to(E4M3).view(torch.uint8))
        assert got_ids.tolist() == row_ids
        assert torch.equal(got_weights, torch.stack(row_weights))

    # Back: each copy adds what its rank gives it, and each weight returns to its place.
    home, home_weights = dispatcher.combine(got * (rank + 1), handle, got_weights * (got_ids >= 0))
    ranks_of = [{int(e) // local for e in token} for token in ids]
    factors = torch.tensor([float(sum(r + 1 for r in ranks)) for ranks in ranks_of])
    assert torch.allclose(home, x * factors.unsqueeze(1), atol=1e-5)
    assert home_weights is not None
    assert torch.equal(home_weights, weights)

    # The same routing again, as for gradients.
    (again,) = dispatcher.dispatch_again((x * 2,), handle)
    assert torch.equal(again, got * 2)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("counts", "only"),
    [
        ([17], None),
        ([17, 5], None),
        ([9, 9, 3, 1], None),
        ([0, 7], None),  # a rank that sends nothing
        ([0, 0], None),
        ([1, 0], None),  # one token in all
        ([6, 5], [0, 1]),  # a rank that receives nothing
        ([4, 4, 4, 4], [7, 6]),
    ],
)
def test_dispatch_and_combine(counts, only, seed):
    run_ranks(len(counts), check_dispatch, counts, seed, only)


def count_bytes(rank: int) -> int:
    x, ids, weights = routing(rank, 4, 0, only=[0, 4])  # both ranks have one of the experts
    dispatcher = AllToAll(dist.distributed_c10d._get_default_group(), EXPERTS)
    dispatcher.dispatch((x,), ids, weights)
    return dispatcher.bytes_sent


def test_bytes_sent_counts_what_leaves_for_other_ranks():
    assert run_ranks(2, count_bytes) == [4 * HIDDEN * 4] * 2
