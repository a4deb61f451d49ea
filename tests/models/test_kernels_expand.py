"""The plan of an expanding dispatch on the device, against the reference bit for bit."""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from models.fp8 import kernels, reference
from models.fp8.kernels.plan_arrivals import CHUNK
from tests.models.test_kernels_numbers import DEVICES, generator, set_up
from tests.models.test_reference_arrivals import SHAPES, route
from tests.models.test_reference_expand import KINDS, ROOMS, room_of, routing
from tests.models.test_reference_rows import STEPS
from tests.support.launches import Launches

EMPTY = torch.empty

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def prepared(monkeypatch, request):
    set_up(monkeypatch, request.node.callspec.params["device"])


def check(ids, local, device, alignment=128, part=None, ranks=None, step=1):
    ids = ids.to(device)
    if ranks is None:
        all_ranks = range(len(ids))
        # The interpreter takes long: with it two of them.
        ranks = all_ranks if device == "cuda" else sorted({0, len(ids) // 2})
    for rank in ranks:
        needed = int(reference.plan_expand(ids, rank, local, alignment).rows.needed)
        room = room_of(needed, part, alignment)
        got = kernels.plan_expand(ids, rank, local, alignment, room, step)
        want = reference.plan_expand(ids, rank, local, alignment, room, step)
        same(got, want, {"rows"}, rank)
        same(got.rows, want.rows, {"num_rows"}, rank)
        assert got.rows.num_rows == want.rows.num_rows


def same(got, want, but, rank):
    for name in vars(want).keys() - but:
        one, other = getattr(got, name), getattr(want, name)
        assert one.dtype is other.dtype, name
        assert torch.equal(one, other), f"{name} of rank {rank}"


@pytest.mark.parametrize("shape", [*SHAPES, (2, CHUNK, 5, 10)])
@pytest.mark.parametrize("part", ROOMS)
def test_plan_expand(device, shape, part):
    if device == "cpu" and shape[1] == CHUNK and part not in (None, 0.5):
        pytest.skip("ten seconds in the interpreter, for what smaller shapes show")
    ranks, tokens, top_k, experts = shape
    check(route(ranks, tokens, top_k, experts, generator()), experts // ranks, device, part=part)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", [128, 1])
@pytest.mark.parametrize("part", ROOMS)
def test_an_uneven_load(device, kind, alignment, part):
    ids, local = routing(kind, generator())
    check(ids, local, device, alignment, part)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("part", [None, 0.5])
def test_rows_in_steps(device, kind, step, part):
    ids, local = routing(kind, generator())
    check(ids, local, device, 16, part, step=step)


@pytest.mark.parametrize("shape", [(4, 2 * CHUNK + 1, 8, 64), (2, 2 * CHUNK - 1, 8, 256)])
def test_many_experts(device, shape):
    ranks, tokens, top_k, experts = shape
    ids = route(ranks, tokens, top_k, experts, generator())
    check(ids, experts // ranks, device, part=0.75, ranks=[ranks - 1])


def test_more_chunks_than_are_added_up_at_once(device, monkeypatch):
    module = sys.modules["models.fp8.kernels.plan_expand"]
    monkeypatch.setattr(module, "SPAN", 2)
    monkeypatch.setattr(module, "COPIES_TILE", 2)  # 16 chunks of those, the least
    check(route(2, 9 * CHUNK + 7, 2, 4, generator()), 2, device, alignment=16, part=0.9)


def test_an_unknown_expert_is_nobodys(device):
    """None of those ids is of the experts here, so nothing is written out of bounds."""
    ids = torch.tensor([[[0, 4], [-2, 1], [10**6, 2]], [[3, -1], [-1, -1], [1, 0]]])
    check(ids, 2, device, part=1.5)


def test_two_launches_and_nothing_else(device, monkeypatch):
    monkeypatch.setattr(torch, "empty", EMPTY)  # without what `set_up` writes there
    ids = route(2, 40, 2, 8, generator()).to(device)
    seen = Launches()
    for owner, name in ((GridExecutor, "__call__"), (JITFunction, "run")):
        launch = getattr(owner, name)

        def counted(self, *args, launch=launch, **kwargs):
            return seen.one(self.fn.__name__, launch)(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    with seen:
        kernels.plan_expand(ids, 0, 4, 128, 1024)
    assert seen.names == ["_count_expand_kernel", "_place_expand_kernel"]


def test_other_ids_are_refused(device):
    with pytest.raises(ValueError, match=r"int64 \[W, T, k\]"):
        kernels.plan_expand(torch.zeros(2, 3, dtype=torch.int64, device=device), 0, 1)
