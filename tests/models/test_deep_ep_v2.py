"""DeepEP v2: with a stand-in for its package on a CPU, with the package on GPUs, the same checks.

On two ranks results equal those of all-to-all and of the permute bit for bit, sums included. More
ranks are added in another order, so there the sums alone may differ, by a rounding.
"""

import functools
import time
import types
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.fp8 import operations
from models.fp8.operations import Operations
from models.fp8.tensor import BlockScaledTensor, Layout
from models.moe.counts import Counts
from models.moe.dispatch import Dispatcher
from models.moe.dispatch.all_to_all import AllToAll
from models.moe.dispatch.deep_ep_v2 import DeepEPv2
from models.moe.dispatch.deep_ep_v2_needs import unavailable
from models.moe.dispatch.trip import Trip
from models.moe.experts import ExpertMLP, prepare_weights
from models.moe.paths import PATHS
from models.moe.runtime import Runtime, build_linear
from tests.support import elastic
from tests.support.gpu_ranks import run_on_gpus
from tests.support.launches import Launches
from tests.support.ranks import run_ranks
from train.profiling.moe import timed_runtime
from train.profiling.timer import Timer

TOP_K, LOCAL, HIDDEN, FFN = 3, 4, 256, 128
TOKENS = 300
"""What buffers are for in all checks but one: DeepEP compiles its kernels for each number."""
TIMEOUT_S = 500

Check = Callable[["Ranks", int], None]


class Ranks:
    """A rank of a group, on a CPU with the stand-in or on a GPU with the package."""

    def __init__(self, device: str, top_k: int = TOP_K, local: int = LOCAL) -> None:
        self.device, self.top_k, self.local = device, top_k, local
        self.group = dist.distributed_c10d._get_default_group()
        self.rank, self.size = self.group.rank(), self.group.size()
        self.experts = self.size * local
        self.ops = operations.choose("fp8_direct", device).operations
        if device == "cpu":
            elastic.install()

    def v2(self, tokens: int = TOKENS, nodes: int = 1) -> DeepEPv2:
        return DeepEPv2(
            self.group, self.ops, self.experts, HIDDEN, self.top_k, tokens, 20, nodes, self.device
        )

    def all_to_all(self) -> AllToAll:
        return AllToAll(self.group, self.experts)

    def batch(self, tokens: int, seed: int, only: int | None = None) -> "Batch":
        return Batch(self, tokens, seed, only)


class Batch:
    """Tokens of one rank in either form, and their routing: anywhere, or to one rank only."""

    def __init__(self, ranks: Ranks, tokens: int, seed: int, only: int | None) -> None:
        gen = torch.Generator().manual_seed(100 * seed + ranks.rank)
        data = torch.randint(0, 127, (tokens, HIDDEN), generator=gen).to(torch.uint8)
        scales = torch.randn(tokens, HIDDEN // 128, generator=gen).exp2()
        x = torch.randn(tokens, HIDDEN, generator=gen).bfloat16()
        order = torch.rand(tokens, ranks.experts, generator=gen)
        if only is not None:
            order[:, only * ranks.local : (only + 1) * ranks.local] -= 1
        ids = order.argsort(1)[:, : ranks.top_k].contiguous()
        weights = torch.rand(tokens, ranks.top_k, generator=gen)
        everything = [t.to(ranks.device) for t in (data, scales, x, ids, weights)]
        data, self.scales, self.x, self.ids, self.weights = everything
        self.data = data.view(torch.float8_e4m3fn)
        self.fp8 = BlockScaledTensor(self.data, self.scales, Layout.COMPACT)


def cases(ranks: int) -> list[tuple[list[int], int | None]]:
    """Tokens of each rank, and the one rank that all go to, if so."""
    odd = [61, 17, 130, 1, 255, 3, 77, 9][:ranks]
    return [
        (odd, None),
        ([0, *odd[1:]], None),  # a rank that sends nothing
        (odd, ranks - 1),  # all others receive nothing
        ([0] * (ranks - 1) + [1], 0),  # one token in all
        ([0] * ranks, None),
    ]


def same(got: Tensor, want: Tensor, what: str) -> None:
    assert got.dtype == want.dtype, what
    assert got.shape == want.shape, what
    # As bytes: NaN is NaN, and 0 is not -0.
    assert torch.equal(*(t.flatten().view(torch.uint8) for t in (got, want))), f"{what} differs"


def same_sum(ranks: Ranks, got: Tensor, want: Tensor, what: str) -> None:
    if ranks.size == 2:
        same(got, want, what)
    else:
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-2, msg=what)


def all_to_all_gives_the_same(ranks: Ranks, seed: int) -> None:
    v2, other = ranks.v2(), ranks.all_to_all()
    for tokens, only in cases(ranks.size):
        batch = ranks.batch(tokens[ranks.rank], seed, only)
        for forms in (
            ((batch.data, batch.scales), (batch.x,)),
            ((batch.x,), (batch.data, batch.scales.T.contiguous().T)),
        ):
            results = []
            for dispatcher in (v2, other):
                dispatcher.bytes_sent = 0
                results.append(round_trip(ranks, dispatcher, batch, *forms))
            for name, want in results[1].items():
                if name in ("home", "home with"):
                    same_sum(ranks, results[0][name], want, name)
                else:
                    same(results[0][name], want, name)
            same(results[0]["home weights"], batch.weights, "each weight returns to its place")
    v2.close()
    v2.close()  # a second time does nothing


def round_trip(
    ranks: Ranks, dispatcher: Dispatcher, batch: Batch, first: Any, second: Any
) -> dict[str, Tensor]:
    received, ids, weights, handle = dispatcher.dispatch(first, batch.ids, batch.weights)
    weights = weights.where(ids >= 0, 0)  # the others are nobody's business
    again = dispatcher.dispatch_again(second, handle)
    (x,) = dispatcher.dispatch_again((batch.x,), handle)
    y = (x.float() * (1.1 + ranks.rank)).bfloat16()
    home, nothing = dispatcher.combine(y, handle)
    assert nothing is None
    home_with, home_weights = dispatcher.combine(y, handle, weights)
    assert home_weights is not None
    named = {"ids": ids, "weights": weights, "home": home, "home with": home_with}
    named |= {"home weights": home_weights, "bytes sent": torch.tensor([dispatcher.bytes_sent])}
    for name, tensors in (("received", received), ("again", again)):
        named |= {f"{name} {i}": t for i, t in enumerate(tensors)}
    return named


def what_is_not_waited_for_is_the_same(ranks: Ranks, seed: int) -> None:
    """The rows that came, and after them some that belong to no expert."""
    v2 = ranks.v2()
    batch = ranks.batch(61, seed)
    (data, scales), ids, weights, _ = v2.dispatch(
        (batch.data, batch.scales), batch.ids, batch.weights
    )
    wide = v2.dispatch((batch.data, batch.scales), batch.ids, batch.weights, wait=False)
    (wide_data, wide_scales), wide_ids, wide_weights, handle = wide
    assert len(wide_ids) == len(wide_data) == TOKENS * ranks.size
    came = len(ids)
    assert came < len(wide_ids)
    assert (wide_ids[came:] == -1).all()
    for got, want in zip(
        (wide_data, wide_scales, wide_ids, wide_weights), (data, scales, ids, weights), strict=True
    ):
        same(got[:came], want, "what came")
    (x,) = v2.dispatch_again((batch.x,), handle)
    home, _ = v2.combine(x.where(wide_ids.amax(1, keepdim=True) >= 0, torch.nan), handle)
    away = (batch.ids // ranks.local)[:, :, None] == torch.arange(ranks.size, device=ranks.device)
    want = batch.x.float() * away.any(1).sum(1, keepdim=True)
    torch.testing.assert_close(home.float(), want, rtol=2**-7, atol=0)
    v2.close()


def trip_of(ranks: Ranks, dispatcher: Dispatcher, batch: Batch, alignment: int, room: int | None):
    ids, weights = batch.ids, batch.weights
    return Trip(dispatcher, ranks.ops, Counts(), ids, weights, ranks.local, alignment, room)


Trips = tuple[Trip, Trip]


def trips_of(
    ranks: Ranks, v2: Dispatcher, other: Dispatcher, batch: Batch, alignment: int, room: int | None
) -> Trips:
    def trip(dispatcher: Dispatcher) -> Trip:
        return trip_of(ranks, dispatcher, batch, alignment, room)

    return trip(v2), trip(other)


def both(trips: Trips, call: Callable[[Trip], Tensor]) -> tuple[Tensor, Tensor]:
    return call(trips[0]), call(trips[1])


def expanding_is_dispatch_and_permute(ranks: Ranks, seed: int) -> None:
    """In both precisions, for each way to give the number of rows, lost rows included."""
    v2, other = ranks.v2(), ranks.all_to_all()
    for tokens, only in cases(ranks.size):
        batch = ranks.batch(tokens[ranks.rank], seed, only)
        for room in (None, 8 * 128 * ranks.size, 128):
            for layout in Layout:
                if room is not None and layout is Layout.COMPACT:
                    continue  # each of the two with and without is enough
                trips = trips_of(ranks, v2, other, batch, 128, room)
                (fp8, bf16, home, homes), want = [expanded(t, batch, layout) for t in trips]
                rows = trips[1].rows
                end = int(rows.offsets[-1])
                if room is None:
                    assert rows.num_rows % ranks.ops.rows_step() == 0
                for name in ("counts", "offsets", "needed"):
                    same(getattr(trips[0].rows, name), getattr(rows, name), name)
                assert trips[0].rows.num_rows == rows.num_rows
                assert int(trips[0].dropped_rows()) == int(trips[1].dropped_rows())
                same(trips[0].probs[:end], trips[1].probs[:end], "routing weights")
                same(fp8.data[:end], want[0].data[:end], "rows in FP8")
                same(fp8.row_scales[:end], want[0].row_scales[:end], f"{layout.name} scales")
                assert fp8.layout is layout
                same(bf16[:end], want[1][:end], "rows in BF16")
                same_sum(ranks, home, want[2], "home")
                same_sum(ranks, homes[0], want[3][0], "home with weights")
                same(homes[1], want[3][1], "weights back")
        assert v2.bytes_sent == other.bytes_sent
    v2.close()


def rows_come_in_steps(ranks: Ranks, seed: int) -> None:
    """As the GEMM wants P. A number that is given stays, and so does what a layer computes."""
    settings = {**vars(ranks.ops), "rows_step": lambda: 384}
    ranks.ops = cast(Operations, types.SimpleNamespace(**settings))
    expanding_is_dispatch_and_permute(ranks, seed)
    layers_compute_the_same(ranks, seed)


def expanded(trip: Trip, batch: Batch, layout: Layout):
    fp8 = trip.expand(batch.fp8, layout)
    bf16 = trip.expand(batch.x)
    y = torch.full_like(bf16, torch.nan)  # behind the last expert's rows nobody looks
    end = int(trip.rows.offsets[-1])
    at = torch.arange(end, device=y.device)[:, None] / 100
    y[:end] = (bf16[:end].float() * (1 + at)).bfloat16()
    numbers = torch.arange(1.0, len(y) + 1, device=y.device)
    return fp8, bf16, trip.combine(y), trip.combine_with_probs(y, numbers)


def same_rows(trips: Trips, rows: tuple[Tensor, Tensor], what: str) -> None:
    """Except for those behind the last expert's, which an expanding dispatch does not write."""
    end = int(trips[1].rows.offsets[-1])
    assert len(rows[0]) == len(rows[1])
    same(rows[0][:end], rows[1][:end], what)


def another_alignment_and_high_precision_first(ranks: Ranks, seed: int) -> None:
    v2, other = ranks.v2(), ranks.all_to_all()
    batch = ranks.batch(50, seed)
    trips = trips_of(ranks, v2, other, batch, 64, None)
    rows = both(trips, lambda t: t.expand(batch.x))
    same_rows(trips, rows, "rows aligned to 64")
    same(trips[0].rows.offsets, trips[1].rows.offsets, "offsets")
    v2.close()


def a_larger_batch_gets_a_larger_buffer(ranks: Ranks, seed: int) -> None:
    v2, other = ranks.v2(20), ranks.all_to_all()
    first, before = v2._buffer, v2.buffer_bytes
    kept = []
    for tokens in (20, TOKENS, 21):
        x, trips = send(ranks, v2, other, tokens, seed)
        kept.append((x, trips))
    assert v2.tokens == TOKENS
    assert v2._buffer is not first
    assert v2.buffer_bytes >= before  # the package has a smallest size, which may hold both
    for x, trips in kept:  # ways that were found with a smaller buffer
        rows = both(trips, functools.partial(Trip.expand, x=x * 2))
        same_rows(trips, rows, "rows again")
        same_sum(ranks, trips[0].combine(rows[0]), trips[1].combine(rows[1]), "home")
    v2.close()


def send(
    ranks: Ranks, v2: Dispatcher, other: Dispatcher, tokens: int, seed: int
) -> tuple[Tensor, Trips]:
    batch = ranks.batch(tokens, seed)
    trips = trips_of(ranks, v2, other, batch, 128, None)
    same_rows(trips, both(trips, lambda t: t.expand(batch.x)), "rows")
    return batch.x, trips


def layers_compute_the_same(ranks: Ranks, seed: int) -> None:
    """With either dispatcher; and fp8_fused computes what fp8_direct does."""
    v2, other = ranks.v2(), ranks.all_to_all()
    for path, as_path in (
        ("bf16", "bf16"),
        ("fp8_direct", "fp8_direct"),
        ("fp8_fused", "fp8_direct"),
        ("fp8_compact", "fp8_baseline") if ranks.device == "cpu" else ("fp8_fused", "fp8_fused"),
    ):
        for settings in ({}, {"recompute": True}, {"capacity": 1.0}, {"capacity": 8.0}):
            ours = layer(ranks, v2, path, settings, seed)
            want = layer(ranks, other, as_path, settings, seed)
            for name, value in want.items():
                what = f"{name} of {path}, {settings}"
                if ranks.size == 2:
                    same(ours[name], value, what)
                else:
                    torch.testing.assert_close(ours[name], value, rtol=0.1, atol=0.1, msg=what)
    v2.close()


def layer(
    ranks: Ranks,
    dispatcher: Dispatcher,
    path: Any,
    settings: Any,
    seed: int,
    timer: Timer | None = None,
) -> dict[str, Any]:
    ops = operations.choose(path, ranks.device).operations
    linear = build_linear(PATHS[path], ops, ranks.device)
    runtime = replace(Runtime(PATHS[path], ops, linear, dispatcher), **settings)
    gen = torch.Generator().manual_seed(seed)
    up = torch.randn(ranks.local, 2 * FFN, HIDDEN, generator=gen) / 16
    down = torch.randn(ranks.local, HIDDEN, FFN, generator=gen) / 16
    batch = ranks.batch(64, seed)
    grad = torch.randn(64, HIDDEN, generator=gen).bfloat16().to(ranks.device)
    leaves = [batch.x, batch.weights, up.bfloat16(), down.bfloat16()]
    leaves = [t.to(ranks.device).requires_grad_() for t in leaves]
    if timer is not None:
        runtime = timed_runtime(runtime, timer)
    prepared = prepare_weights(leaves[2], leaves[3], torch.bfloat16, runtime)
    out = ExpertMLP.apply(*leaves, batch.ids, 0, runtime, prepared)
    out.backward(grad)
    names = ("tokens", "weights", "up", "down")
    found = {name: t.grad for name, t in zip(names, leaves, strict=True)}
    counts = runtime.counts
    assert counts.relayouts["forward"] == 0 or path in ("fp8_baseline", "fp8_compact")
    dropped = torch.as_tensor(counts.dropped_rows).cpu()
    return found | {"out": out.detach(), "dropped": dropped}


def the_gemm_gets_scales_as_it_reads_them(ranks: Ranks, seed: int) -> None:
    """With either dispatcher, whichever layout that is."""
    v2, batch = ranks.v2(), ranks.batch(40, seed)
    seen: list[Layout] = []

    def forward(x: BlockScaledTensor, *_: Any) -> Any:
        seen.append(x.layout)

    linear: Any = types.SimpleNamespace(forward=forward)
    for dispatcher in (v2, ranks.all_to_all()):
        for path in ("fp8_direct", "fp8_fused"):
            for layout in Layout:
                ops: Any = types.SimpleNamespace(**{**vars(ranks.ops), "GEMM_LAYOUT": layout})
                trip = trip_of(ranks, dispatcher, batch, 128, None)
                PATHS[path].to_experts(batch.x, None, trip, ops, linear)  # type: ignore[index]
    assert seen == [*Layout] * 4
    v2.close()


def a_layer_is_timed(ranks: Ranks, seed: int) -> None:
    """What is one call is one part: there is no permute."""
    v2, timer = ranks.v2(), Timer(torch.device(ranks.device))
    want = layer(ranks, v2, "fp8_fused", {}, seed)
    timer.start()
    got = layer(ranks, v2, "fp8_fused", {}, seed, timer)
    parts = [name for name, _, _ in timer.stop().spans]
    for name, value in want.items():
        same(got[name], value, name)
    first = ["quantize", "dispatch", "up_projection", "swiglu", "down_projection", "combine"]
    assert parts[2 : 2 + len(first)] == first
    assert parts.count("dispatch") == parts.count("combine") == 2
    assert "permute" not in parts
    v2.close()


def few_kernels_are_launched(ranks: Ranks, seed: int) -> None:
    """Short layers are bound by the host, so this is what an expanding dispatch costs there."""
    v2, batch, seen = ranks.v2(), ranks.batch(TOKENS, seed), Launches()
    v2.ops = cast(Operations, types.SimpleNamespace(**vars(ranks.ops)))
    for owner, name, as_name in (
        (v2.ops, "plan_expand", "2 of the plan"),
        (v2._buffer, "dispatch", "2 of DeepEP's dispatch"),
        (v2._buffer, "combine", "2 of DeepEP's combine"),
    ):
        setattr(owner, name, seen.one(as_name, getattr(owner, name)))
    trip = trip_of(ranks, v2, batch, 128, 128 * 40)
    with seen:
        trip.expand(batch.fp8, Layout.GEMM_READY)
    first = ["_allgather_base_", "2 of the plan", "2 of DeepEP's dispatch"]
    assert seen.names == [*first, "add_"]
    seen.names.clear()
    with seen:
        rows = trip.expand(batch.x)
        trip.combine_with_probs(rows, trip.probs)
    assert seen.names == ["2 of DeepEP's dispatch", "add_", "2 of DeepEP's combine"]
    v2.close()


def between_nodes_it_plans_for_itself(ranks: Ranks, seed: int) -> None:
    """The same rows, in an order of its own within each expert."""
    v2, other = ranks.v2(nodes=2), ranks.all_to_all()
    assert v2.why_it_waits is not None
    batch = ranks.batch(50 + ranks.rank, seed)
    trips = trips_of(ranks, v2, other, batch, 128, None)
    rows = both(trips, lambda t: t.expand(batch.x))
    same(trips[0].rows.offsets, trips[1].rows.offsets, "offsets")
    assert trips[0].rows.num_rows == trips[1].rows.num_rows == len(rows[0])
    for start, end in pairwise(trips[0].rows.offsets.tolist()):
        ours, want = (r[start:end][r[start:end].float().sum(1).argsort()] for r in rows)
        same(ours, want, "an expert's rows")
    same_sum(ranks, trips[0].combine(rows[0]), trips[1].combine(rows[1]), "home")
    received, ids, _, handle = v2.dispatch((batch.data, batch.scales), batch.ids, batch.weights)
    assert len(received[0]) == len(ids) == int((ids >= 0).any(1).sum())
    (x,) = v2.dispatch_again((batch.x,), handle)
    home, _ = v2.combine(x, handle)
    (want,) = other.dispatch_again((batch.x,), (trips[1]._handle))
    same_sum(ranks, home, other.combine(want, trips[1]._handle)[0], "home")
    assert v2.bytes_sent > 0
    v2.close()


def what_is_wrong_is_said(ranks: Ranks, seed: int) -> None:
    v2 = ranks.v2()
    batch = ranks.batch(8, seed)
    with pytest.raises(ValueError, match="data and scales, got 3"):
        v2.dispatch((batch.x, batch.x, batch.x), batch.ids, batch.weights)
    (x,), *_, handle = v2.dispatch((batch.x,), batch.ids, batch.weights)
    with pytest.raises(TypeError, match=r"bfloat16 only, got torch\.float32"):
        v2.combine(x.float(), handle)
    v2.close()


CHECKS: list[Check] = [
    all_to_all_gives_the_same,
    what_is_not_waited_for_is_the_same,
    expanding_is_dispatch_and_permute,
    rows_come_in_steps,
    another_alignment_and_high_precision_first,
    a_larger_batch_gets_a_larger_buffer,
    layers_compute_the_same,
    the_gemm_gets_scales_as_it_reads_them,
    what_is_wrong_is_said,
]
"""For the stand-in and for the package."""


ONE_EACH = {"top_k": 2, "local": 1}
"""An expert on each rank and, on four, fewer places than ranks: no rank has two copies of a token,
and combine sums by place."""
WITH_ONE_EACH = (expanding_is_dispatch_and_permute, layers_compute_the_same)
"""What is checked so too."""


ON_ONE_SIZE = (a_layer_is_timed, few_kernels_are_launched, between_nodes_it_plans_for_itself)
"""What does not depend on how many ranks there are."""


def on_cpu(rank: int, check: Check, seed: int, shape: dict[str, int]) -> None:
    check(Ranks("cpu", **shape), seed)


@pytest.mark.parametrize(
    ("check", "ranks", "shape"),
    [
        *((check, 2, {}) for check in (*CHECKS, *ON_ONE_SIZE)),
        # Without one that repeats two others.
        *((check, 4, {}) for check in CHECKS if check is not rows_come_in_steps),
        *((check, 4, ONE_EACH) for check in WITH_ONE_EACH),
    ],
)
def test_with_a_stand_in(check, ranks, shape):
    seed = int(torch.randint(10_000, ()))  # pytest prints it on failure
    run_ranks(ranks, on_cpu, check, seed, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_with_the_package(ranks, tmp_path):
    if (reason := unavailable(ranks, ranks)) is not None:
        pytest.skip(reason)
    # All checks in one group, since DeepEP compiles its kernels for each shape.
    run_on_gpus(ranks, on_gpu, tmp_path, TIMEOUT_S, collective_s=120)


def on_gpu(rank: int, ranks: int) -> None:
    only_here = (nothing_waits, a_layer_is_the_same_each_time)
    checks: list[tuple[Check, dict[str, int]]] = [(check, {}) for check in (*CHECKS, *only_here)]
    checks += [(check, ONE_EACH) for check in (*WITH_ONE_EACH, a_layer_is_the_same_each_time)]
    for check, shape in checks:
        started = time.monotonic()
        check(Ranks("cuda", **shape), 7)
        torch.cuda.synchronize()
        if rank == 0:
            print(f"{check.__name__} {shape}: {time.monotonic() - started:.1f} s", flush=True)


def nothing_waits(ranks: Ranks, seed: int) -> None:
    """With room set aside, from dispatch to combine."""
    v2 = ranks.v2()
    batch = ranks.batch(64, seed)
    for mode in ("default", "default", "error"):  # kernels are compiled before
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        trip = trip_of(ranks, v2, batch, 128, 4096)
        fp8 = trip.expand(batch.fp8, Layout.GEMM_READY)
        rows = trip.expand(batch.x)
        trip.combine_with_probs(rows, trip.probs)
        torch.cuda.set_sync_debug_mode("default")
        assert fp8.rows == 4096
    v2.close()


def a_layer_is_the_same_each_time(ranks: Ranks, seed: int) -> None:
    v2 = ranks.v2()
    first = layer(ranks, v2, "fp8_fused", {}, seed)
    for settings in ({}, {}, {"capacity": 8.0}, {"recompute": True}):
        for name, value in layer(ranks, v2, "fp8_fused", settings, seed).items():
            same(value, first[name], f"{name}, {settings}")
    v2.close()
