"""Room that would not fit into a GPU's memory is not reserved."""

from typing import Any

import pytest
import torch

from models.moe import room as rooms
from models.moe import room_memory
from models.moe.room import Room
from models.moe.room_memory import LOOK, UNKNOWN, GpuMemory, RoomMemory, RowBytes
from tests.support.pretend_memory import PretendMemory, shares_fit
from tests.support.ranks import run_ranks

EVEN, MOST, STEP, LAYERS = 1024, 4096, 64, 3
ROW = RowBytes(kept=1000, computing=2000)
Needs = list[list[int]]
"""Rows that each layer needs, on each rank."""

CALM: Needs = [[1000, 1010, 1020], [1024, 1000, 1000], [900, 1000, 1024], [1000, 1000, 1000]]
UNEVEN: Needs = [[1000, 1950, 1000], *CALM[1:]]


def steps(room: Room, memory: PretendMemory, rank: int, needs: list[Needs], reset: bool = True):
    """P of all layers in each step, None where it waited, and which would not have fitted."""
    found: list[tuple[tuple[int | None, ...], bool]] = []
    for of_ranks in needs:
        for wait in (False, True):
            with room.open(wait):
                for layer, need in enumerate(of_ranks[rank]):
                    rows = room.max_rows(layer, EVEN, MOST, STEP)
                    room.note(layer, torch.tensor(need))
                    room.note_memory(layer, need if rows is None else rows, ROW)
                    memory.take(layer, need if rows is None else rows, ROW)
                room.send()
            if not wait:
                found.append((tuple(room.rows), room.too_large is not None))
            if not room.ran_out():
                break
        memory.end_step(reset)
    return found


def tight(rank: int, reset: bool) -> dict[str, Any]:
    """The third rank, or the last of two, has memory for 1.5 even shares in every layer."""
    moments = 2_000_000
    memory = PretendMemory(rest=(4 - rank) * 3_000_000, made_by_optimizer=moments)
    shares = 1.5 if rank == min(2, torch.distributed.get_world_size() - 1) else 4
    memory.full = memory.rest + moments + shares_fit(shares, EVEN, LAYERS, ROW)
    room = Room(LAYERS, memory)
    found = {
        "calm": steps(room, memory, rank, [CALM] * 4, reset),
        "uneven": steps(room, memory, rank, [UNEVEN], reset),
        "after": steps(room, memory, rank, [CALM] * (rooms.WINDOW + 2), reset),
    }
    return {**found, "times": room.times_too_large}


WAITED = (None,) * LAYERS


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("reset", [True, False])
def test_a_step_whose_room_would_not_fit_waits_on_every_rank(ranks, reset):
    """Whether or not the peak is counted from scratch after each step. That no rank is ever out of
    memory, `PretendMemory` asserts."""
    first, *others = run_ranks(ranks, tight, reset)
    assert all(other == first for other in others)
    # What is needed is known after the first step, what memory it takes after the second, and
    # what that is on all ranks after the third.
    calm = (1152, 1152, 1152)
    assert first["calm"] == [(WAITED, False)] * 3 + [(calm, False)]
    assert first["uneven"] == [(calm, False)]
    # 1950 and a quarter, as it was a surprise: 1.25 shares, 2.25 and 1.25 would be too much.
    want = [(WAITED, True)] * rooms.WINDOW
    assert first["after"][: rooms.WINDOW] == want, "the step's need is remembered"
    assert first["after"][rooms.WINDOW :] == [((1280, 1280, 1280), False)] * 2
    assert first["times"] == rooms.WINDOW


def plenty(rank: int) -> tuple[Any, Any]:
    memory = PretendMemory(rest=10**6)
    memory.full = 10**12
    needs = [CALM, CALM, CALM, UNEVEN, *[CALM] * 5]
    bounded = steps(Room(LAYERS, memory), memory, rank, needs)
    return bounded, steps(Room(LAYERS), PretendMemory(0), rank, needs)


def test_enough_memory_changes_nothing_but_the_second_and_third_step():
    for bounded, unbounded in run_ranks(2, plenty):
        assert bounded[1:3] == [(WAITED, False)] * 2
        assert [None in rows for rows, _ in unbounded] == [True] + [False] * 8
        assert bounded[:1] + bounded[3:] == unbounded[:1] + unbounded[3:]


class Counters:
    """An allocator's, as set."""

    top = full = 0

    def peak(self) -> int:
        return self.top

    def limit(self) -> int:
        return self.full


def attempt(
    memory: RoomMemory, counters: Counters, peak: int, *micro_batches: list[int], before: int = 0
) -> None:
    counters.top = before
    memory.begin()
    counters.top = peak
    for rows in micro_batches:
        for layer, one in enumerate(rows):
            memory.note(layer, one, ROW)
    memory.end()


def over_the_limit(memory: RoomMemory) -> tuple[int, int]:
    """What a rank alone would agree on: with the peak at the experts, and at the loss."""
    memory.agree(memory.to_agree())
    return memory.to_agree()[:2]


def test_the_rest_is_what_no_row_takes():
    counters = Counters()
    memory = RoomMemory(2, counters)
    assert memory.to_agree() == (UNKNOWN, UNKNOWN, 0, 0)
    # The first step is not like the others: the optimizer has made nothing yet.
    attempt(memory, counters, 80_000_000, [1000, 2000])
    assert memory.to_agree() == (UNKNOWN, UNKNOWN, *ROW)
    counters.full = 100_000_000
    attempt(memory, counters, 30_000_000, [1000, 2000])
    # 3 million are kept for rows, and 4 are for the last layer's gradients, if the peak is there.
    assert memory.to_agree() == (23_000_000 - 100_000_000, 27_000_000 - 100_000_000, *ROW)
    # Where the micro-batches' rows differ, which of them had the peak is not known: the second
    # takes 13 million in the last layer, the first 8 at the loss.
    attempt(memory, counters, 23_000_000, [5000, 3000], [1000, 4000], [5000, 3000])
    assert over_the_limit(memory) == (10_000_000 - 100_000_000, 18_000_000 - 100_000_000)
    # An older peak, or the optimizer's, says less than what is known.
    for _ in range(50):
        attempt(memory, counters, 90_000_000, [1000, 1000], before=90_000_000)
        assert over_the_limit(memory) == (-90_000_000, -82_000_000)
    # One that says more counts, and a peak of this attempt's whatever it says.
    attempt(memory, counters, 13_000_000, [1000, 1000], before=13_000_000)
    assert over_the_limit(memory) == (9_000_000 - 100_000_000, 11_000_000 - 100_000_000)
    attempt(memory, counters, 14_000_001, [1000, 1000], before=14_000_000)
    assert over_the_limit(memory) == (10_000_001 - 100_000_000, 12_000_001 - 100_000_000)


def test_what_fits():
    memory = RoomMemory(2, Counters())
    memory.agree([-90_000_000, -90_000_000, *ROW])
    # 40 million kept, and 50 while the last layer computes.
    assert memory.fits([15_000, 25_000])
    assert not memory.fits([15_001, 25_000])
    assert not memory.fits([14_999, 25_001])
    # 30 million kept, and 60 while the first computes; the last has freed its rows.
    assert memory.fits([30_000, 20_000])
    assert not memory.fits([30_001, 100])
    # At the loss nothing computes with rows.
    memory.agree([-90_000_000, -40_000_000, *ROW])
    assert memory.fits([25_000, 15_000])
    assert not memory.fits([25_001, 15_000])


def test_the_limit_is_read_again():
    counters = Counters()
    memory = RoomMemory(1, counters)
    attempt(memory, counters, 0, [0])
    found = []
    for _ in range(LOOK + 1):
        attempt(memory, counters, 0, [0])
        found.append(-over_the_limit(memory)[0])
        counters.full += 1
    assert found == [0] * LOOK + [LOOK]


def test_no_rows_say_nothing_of_a_row():
    assert room_memory.row_bytes(0, 0, 8, 4, 2, recompute=False) == (0, 88)


@pytest.mark.gpu
def test_what_a_gpu_counts():
    memory = GpuMemory()
    torch.cuda.synchronize()
    limit = memory.limit()
    _, total = torch.cuda.mem_get_info()
    size = 64 * 2**20
    torch.cuda.reset_peak_memory_stats()
    before = memory.peak()
    torch.cuda.set_sync_debug_mode("error")
    try:
        held = torch.empty(size, dtype=torch.uint8, device="cuda")
        assert memory.peak() == before + held.nbytes
        torch.empty(size, dtype=torch.uint8, device="cuda")
        assert memory.peak() == before + 2 * size
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert before < limit < total
    # What is reserved can hold tensors: reserving it took nothing off the limit.
    assert memory.limit() == pytest.approx(limit, rel=0.01)
