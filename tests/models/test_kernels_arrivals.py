"""The plan of arrivals on the device, against the reference bit for bit."""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from models.fp8 import kernels, reference
from models.fp8.kernels.plan_arrivals import CHUNK
from tests.models.test_kernels_numbers import DEVICES, generator, set_up
from tests.models.test_reference_arrivals import SHAPES, route

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def prepared(monkeypatch, request):
    set_up(monkeypatch, request.node.callspec.params["device"])


def check(ids, local, device, ranks=None):
    ids = ids.to(device)
    for rank in range(len(ids)) if ranks is None else ranks:
        got = kernels.plan_arrivals(ids, rank, local)
        want = reference.plan_arrivals(ids, rank, local)
        for name, tensor in vars(want).items():
            assert getattr(got, name).dtype is tensor.dtype, name
            assert torch.equal(getattr(got, name), tensor), f"{name} of rank {rank}"


@pytest.mark.parametrize(
    ("ranks", "tokens", "top_k", "experts"),
    [*SHAPES, (2, CHUNK, 5, 10), (4, 2 * CHUNK + 1, 8, 64)],
)
def test_plan_arrivals(device, ranks, tokens, top_k, experts):
    check(route(ranks, tokens, top_k, experts, generator()), experts // ranks, device)


def test_one_rank_gets_all(device):
    ids = torch.arange(4).repeat(4, 30, 1) + 8
    check(ids, 4, device)


def test_more_chunks_than_are_added_up_at_once(device, monkeypatch):
    monkeypatch.setattr(sys.modules["models.fp8.kernels.plan_arrivals"], "SPAN", 2)
    check(route(2, 5 * CHUNK + 7, 2, 4, generator()), 2, device)


def test_other_ids_are_refused(device):
    with pytest.raises(ValueError, match=r"int64 \[W, T, k\]"):
        kernels.plan_arrivals(torch.zeros(2, 3, dtype=torch.int64, device=device), 0, 1)
