"""How much room the experts get, and what is said about it."""

import json
import re
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.config import MoEConfig
from models.moe import room as rooms
from models.moe.paths import PATHS
from models.moe.room import Room, settle
from models.moe.runtime import Runtime
from scripts.bench.stacks.ours import use_runtime
from tests.models.test_gpt import batch, build, configure
from tests.support.ranks import run_ranks

EVEN, MOST, STEP = 1024, 4096, 64
NEEDS = Path(__file__).parents[2] / "docs" / "results"
NEEDS_FILES = ("room_needs.json", "room_needs_cpu.json")


def rows_of(room: Room, *needs: int, misled: int = 0) -> list[int | None]:
    """P of the second of three layers in steps in which it needs this many rows on this rank, and
    the others hardly any; or, after it has lost rows, `misled` more."""
    found = []
    for need in needs:
        with room.open(wait=False):
            given = [room.max_rows(layer, EVEN, MOST, STEP) for layer in range(3)]
            for layer, rows in enumerate((7, need + misled, 5)):
                room.note(layer, torch.tensor(3))  # of another micro-batch
                room.note(layer, torch.tensor(rows))
            room.send()
        assert given[0] in (None, STEP * 3, STEP * 5), "a layer that needs little gets little"
        found.append(given[1])
        if room.ran_out():
            with room.open(wait=True):
                for layer, rows in enumerate((7, need, 5)):
                    assert room.max_rows(layer, EVEN, MOST, STEP) is None
                    room.note(layer, torch.tensor(rows))
                room.send()
            assert not room.ran_out()
    return found


def policy(rank: int) -> dict[str, Any]:
    learned = Room(3)
    assert learned.max_rows(1, EVEN, MOST, STEP) is None, "nobody would look whether rows were lost"
    found: dict[str, Any] = {"first": rows_of(learned, 1100 - 100 * rank)}
    found["wobble"] = set(rows_of(learned, *range(1020, 1090, 7)))
    found["overflow"] = rows_of(learned, 2000, misled=1000) + rows_of(learned, 1050)
    found["share"] = learned.share
    found["bound"] = rows_of(learned, 4096, 1050, 1050)
    long_ago = rows_of(learned, *[1050] * (rooms.WINDOW + 1))
    found["shrunk"] = (long_ago[0], long_ago[-1])
    found["calm"] = rows_of(learned, *[1050] * rooms.SURPRISES)[-1]
    return found


def test_room_follows_what_was_needed():
    """The same on every rank, though the first needed more on one of them."""
    one, other = run_ranks(2, policy)
    assert one == other
    assert one["first"] == [None]
    # 1100 and 1/8 of 1024, rounded up to a multiple of 64.
    assert one["wobble"] == {1280}
    # Then the surprise was 900, of which 1/4 of 1024 counts, in all layers.
    assert one["overflow"] == [1280, 2304]
    # The others' 7 and 5 and 256 make five times 64.
    assert one["share"] == pytest.approx((320 + 2304 + 320) / EVEN / 3)
    assert one["bound"] == [2304, MOST, MOST]
    assert one["shrunk"] == (MOST, 1344)
    assert one["calm"] == 1216, "1050 and 1/8 of 1024: the surprises are forgotten"


def kept(room: Room, *needs: int, thrown_away: int = 0) -> list[int | None]:
    """P of the only layer in steps that need this; an attempt that may lose rows `thrown_away`
    more."""
    found = []
    for need in needs:
        for wait in (False, True):
            with room.open(wait):
                rows = room.max_rows(0, EVEN, MOST, STEP)
                room.note(0, torch.tensor(need if wait else need + thrown_away))
                room.send()
            found += [] if wait else [rows]
            if not room.ran_out():
                break
    return found


def surprises(rank: int) -> tuple[list[int | None], list[int | None]]:
    failed, lasting = Room(1), Room(1)
    kept(failed, 1000)
    after = kept(failed, 1150, thrown_away=100) + kept(failed, 1000)
    kept(lasting, 1000, 1200)
    return after, kept(lasting, *[1000] * 101)[-2:]


def test_a_surprise_counts_for_a_hundred_steps_and_not_if_its_rows_were_thrown_away():
    ((after, lasting),) = run_ranks(1, surprises)
    # 1000 and 128. Then 1150 and 150, though the attempt that lost rows needed 250 more.
    assert after == [1152, 1344]
    assert lasting == [1216, 1152], "200 are spared, and then 128"


def exactly(rank: int) -> bool:
    room = Room(1)
    kept(room, 1000)
    (rows,) = kept(room, 1000)
    assert rows == 1152
    with room.open(wait=False):
        room.max_rows(0, EVEN, MOST, STEP)
        room.note(0, torch.tensor(rows))
        room.send()
    return room.ran_out()


def test_p_rows_are_enough_for_p_rows():
    assert run_ranks(1, exactly) == [False]


def recorded() -> dict[str, tuple[int, list[list[int]]]]:
    """An even share and the rows that each layer needed, step by step: on two GPUs, and counted for
    2, 4 and 8 ranks on a CPU."""
    one, several = (json.loads((NEEDS / name).read_text()) for name in NEEDS_FILES)
    records = {"moe_small": one}
    for found in several["records"]:
        records[f"seed {found['seed']}, {found['expert_parallel']} ranks"] = found
    return {
        name: (record["even_rows"], [row["needed"] for row in record["rows"]])
        for name, record in records.items()
    }


def on_recorded_needs(rank: int, fixed: bool) -> dict[str, tuple[list[int], float]]:
    """What Room makes of them, or with `fixed` an eighth to spare, whatever happened: steps
    that are repeated, and the mean room after the twentieth, in even shares."""
    found = {}
    for name, (even, steps) in recorded().items():
        room, repeated, shares = Room(len(steps[0])), [], []
        if fixed:
            room._surprises = deque(maxlen=0)
        for number, needed in enumerate(steps, 1):
            wait = False
            for _ in range(2):
                with room.open(wait):
                    given = [
                        room.max_rows(layer, even, 9 * even, 128) for layer in range(len(needed))
                    ]
                    for layer, rows in enumerate(needed):
                        room.note(layer, torch.tensor(rows))
                    room.send()
                if number > 20 and not wait:
                    shares.append(sum(rows or 0 for rows in given) / even / len(needed))
                if not (wait := room.ran_out()):
                    break
                repeated.append(number)
        found[name] = (repeated, sum(shares) / len(shares))
    return found


def test_room_on_needs_that_were_recorded():
    """What is said at `SURPRISES`."""
    (now,) = run_ranks(1, on_recorded_needs, False)
    (fixed,) = run_ranks(1, on_recorded_needs, True)
    assert sum(len(steps) for _, steps in recorded().values()) == 1080

    def repeated(found: dict[str, tuple[list[int], float]]) -> tuple[int, int]:
        steps = [step for repeated, _ in found.values() for step in repeated]
        return len(steps), sum(step > 20 for step in steps)

    assert repeated(now) == (20, 2)
    assert repeated(fixed) == (44, 16)
    more = {name: now[name][1] - fixed[name][1] for name in now}
    for name, shares in more.items():
        low, high = (0.02, 0.065) if name.endswith(("small", "2 ranks")) else (0.09, 0.13)
        assert low < shares < high, (name, shares)


@pytest.mark.parametrize("step", [1, 384, 10_000])
def test_room_heeds_what_the_gemm_wants_and_a_number_does_not(step):
    ops: Any = SimpleNamespace(rows_step=lambda: step)
    unused: Any = SimpleNamespace(ranks=2)
    room = Room(1)
    runtime = Runtime(PATHS["fp8_direct"], ops, unused, unused, room=room)
    room._needs.append([2100])
    with room.open(wait=False):
        rows = runtime.max_rows(0, 1024, 2, 4)
    most = 2 * 1024 * 2 + 3 * 128  # each copy, and 127 rows for each expert, in whole blocks
    # 2100 and 1/8 of 2048 in steps of 128, or of 384.
    assert rows == {1: 2432, 384: 2688, 10_000: most}[step]
    # In blocks of 128: 1.25 of 2048, and one for each expert.
    assert replace(runtime, capacity=1.25, room=None).max_rows(0, 1024, 2, 4) == (20 + 4) * 128
    assert replace(runtime, capacity=1e308, room=None).max_rows(0, 1024, 2, 4) == most


def moe(capacity: Any, path: str = "bf16") -> MoEConfig:
    keys = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 128}
    return MoEConfig.model_validate({**keys, "capacity": capacity, "path": path})


GEMMS, SPLITS = "its GEMMs want it", "all_to_all wants it"


@pytest.mark.parametrize(
    ("wanted", "device", "gemms", "splits", "capacity", "has_room", "says"),
    [
        (None, "cuda", None, None, None, False, ""),
        ("default", "cpu", None, SPLITS, None, False, ""),
        ("default", "cuda", None, None, None, True, "what was needed lately"),
        ("default", "cuda", GEMMS, None, None, False, f"every layer waits .* as {GEMMS}"),
        ("default", "cuda", None, SPLITS, None, False, f"every layer waits .* as {SPLITS}"),
        ("auto", "cpu", None, SPLITS, None, True, "what was needed lately"),
        ("auto", "cuda", None, SPLITS, None, True, f"waits anyway, as {SPLITS}"),
        ("auto", "cuda", GEMMS, None, None, False, f"every layer waits .* as {GEMMS}"),
        (1.5, "cuda", None, None, 1.5, False, r"capacity=1.5: bf16 drops rows .* another function"),
        (1.5, "cuda", GEMMS, None, None, False, f"ignored, as {GEMMS}: .* another function"),
        (1.5, "cpu", None, None, None, False, "ignored, as a CPU .* drops nothing, as with null$"),
    ],
)
def test_who_gets_room_and_who_waits(wanted, device, gemms, splits, capacity, has_room, says):
    got, room, said = settle(moe(wanted), 2, device, gemms, splits)
    assert (got, room is not None) == (capacity, has_room)
    assert re.search(says, said) if says else not said


def dropped(rank: int, training: bool) -> tuple[float, bool]:
    """Rows that a model with too little room drops, and whether its losses are those of enough."""
    config = configure("parallel.expert_parallel=1", "model.seq_len=256")
    model = build(config).train(training)
    want = model(*batch(config))
    use_runtime(model, replace(model.runtime, capacity=0.25))
    got = model(*batch(config))
    return float(model.runtime.counts.dropped_rows), torch.equal(got, want)


def test_validation_drops_nothing_where_training_does():
    ((lost, same),) = run_ranks(1, dropped, True)
    assert lost > 0
    assert not same
    assert run_ranks(1, dropped, False) == [(0, True)]


def test_the_table_of_what_deep_ep_v2_would_take():
    """docs/how-it-works.md: computed, so what it says is computed here."""
    tokens, top_k, experts, hidden = 16384, 8, 128, 2048
    text = (Path(__file__).parents[2] / "docs/how-it-works.md").read_text(encoding="utf-8")
    table = text.partition("| ranks | experts on each |")[2].partition("\n\n")[0]
    lines = [line.replace(",", "").strip("| ").split(" | ") for line in table.splitlines()[2:]]
    for ranks, line in zip((2, 4, 8, 16, 32, 64), lines, strict=True):
        local = experts // ranks
        even = tokens * top_k
        room = Room(1)
        room._needs.append([even + local * 64])
        with room.open(wait=False):
            rows = room.max_rows(0, even, 10**9, 128)
        assert rows is not None
        with room.open(wait=False):
            in_waves = room.max_rows(0, even, 10**9, 128 * 132)
        assert f"`auto` gives {in_waves:,} rows" in text
        most = ranks * tokens * min(top_k, local) + local * 127
        most = -(-most // 128) * 128
        fp8 = hidden * 33 // 32
        # A row in BF16, and what is sent with it: experts, weights, numbers, to a multiple of 32.
        row = hidden * 2 + -(-(top_k * 8 + (1 + top_k) * 4) // 32) * 32
        sizes = [rows * fp8, most * fp8, ranks * tokens * row]
        want = [ranks, local, rows, most, *(round(size / 2**20) for size in sizes)]
        assert [int(cell) for cell in line] == want
