"""`moe.capacity=auto` trains to the bits of `null`, whatever room the experts get."""

from pathlib import Path

import pytest

from models.fp8.tensor import BLOCK
from tests.support.faults import cramp, crowd
from tests.support.pretend_memory import limit
from tests.support.ranks import Training, read_metrics
from tests.support.tiny import Rows, argv, checkpoints, computed
from tests.train.test_resume import forget
from tests.train.test_same_run import config_of as config_with
from tests.train.test_same_run import write_checkpoint
from train.checkpoint.same_run import check_checkpoint
from train.config import Config, ConfigError

KEYS = ["model.num_layers=2", "model.seq_len=128", "train.micro_batch=2", "train.steps=7"]
"""Enough tokens that a rank's rows are more than what rounding up adds to each expert's."""

EP2 = ("parallel.expert_parallel=2", "train.global_batch=8")
EP4 = ("parallel.expert_parallel=4", "train.global_batch=16", "moe.num_experts=8")


def train(folder: Path, name: str, ranks: int, *keys: str, plant=None) -> Rows:
    arguments = argv(folder, name, *KEYS, *keys)
    with Training(ranks, arguments, folder / f"{name}.log", plant) as training:
        assert training.exit_codes(120) == [0] * ranks, training.log.read_text()
    return read_metrics(folder / name)


def redone(rows: Rows) -> float:
    return sum(row.get("moe/redone_steps", 0) for row in rows)  # some only say a validation's loss


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        # Counters run over several steps, accumulation and validations in each interval.
        (2, [*EP2, "train.log_every=3", "train.valid_every=2", "train.valid_batches=1"]),
        pytest.param(2, [*EP2, "moe.path=fp8_compact"], marks=pytest.mark.slow),
        pytest.param(4, [*EP4, "moe.path=fp8_direct"], marks=pytest.mark.slow),
        pytest.param(2, [*EP2, "moe.path=fp8_fused"], marks=pytest.mark.slow),
        # Replicas, whose gradients FSDP gathers up over micro-batches.
        pytest.param(4, ["parallel.expert_parallel=2", EP4[1]], marks=pytest.mark.slow),
        pytest.param(
            2, [*EP2, "moe.recompute=true", "moe.path=fp8_baseline"], marks=pytest.mark.slow
        ),
        # Drawn in every forward pass.
        (2, [*EP2, "moe.force_balance=true"]),
        pytest.param(
            1, ["train.global_batch=4", "optim.prepare_weights=true"], marks=pytest.mark.slow
        ),
        pytest.param(
            2,
            [*EP2, "train.on_nonfinite=skip", "moe.expert_bias=true", "moe.bias_update_rate=0.5"],
            marks=pytest.mark.slow,
        ),
        # Timed, and traced, in runtimes of their own.
        pytest.param(
            2,
            [*EP2, "train.profile=true", "train.profile_every=1", "train.trace_step=4"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_that_is_done_again_leaves_no_trace(tmp_path, ranks, keys):
    keys = ["parallel.expert_parallel=1", *keys]
    want = train(tmp_path, "null", ranks, "moe.capacity=null", *keys)
    got = train(tmp_path, "auto", ranks, "moe.capacity=auto", *keys, plant=cramp(2, 3, 5))
    assert computed(got) == computed(want)
    assert redone(got) == 3
    assert not any(key in row for row in want for key in ("moe/room", "moe/redone_steps"))


def test_a_rank_to_which_no_row_comes(tmp_path):
    """One token on each of two ranks, and one expert for each token."""
    keys = ["parallel.expert_parallel=2", "train.global_batch=2", "train.micro_batch=1"]
    keys += ["model.seq_len=1", "moe.top_k=1", "train.steps=20"]
    want, got = (
        train(tmp_path, name, 2, f"moe.capacity={name}", *keys) for name in ("null", "auto")
    )
    assert computed(got) == computed(want)
    assert max(row["moe/max_expert_load"] for row in got) == 4, "an expert of four got all"


STEP = 384


def in_steps(folder: Path, then=None):
    """P as multiples of `STEP`, and in `folder`, for each rank, every P and what was needed."""

    def plant(rank: int) -> None:
        from models.fp8 import reference
        from models.moe import experts

        compute = experts._compute

        def noted(*args):
            y, saved = compute(*args)
            rows = saved.trip.rows
            with (folder / f"rows.{rank}").open("a") as file:
                print(len(y), int(rows.needed), file=file)
            return y, saved

        experts._compute = noted
        reference.rows_step = lambda: STEP
        if then is not None:
            then(rank)

    return plant


@pytest.mark.parametrize(
    ("capacity", "keys"),
    [
        ("auto", ["moe.path=fp8_direct", "train.valid_every=2", "train.valid_batches=1"]),
        pytest.param("auto", ["moe.path=fp8_fused", "moe.recompute=true"], marks=pytest.mark.slow),
        pytest.param("null", ["moe.path=fp8_direct", "moe.recompute=true"], marks=pytest.mark.slow),
        pytest.param("null", ["moe.path=fp8_fused", "train.valid_every=2"], marks=pytest.mark.slow),
    ],
)
def test_rows_that_come_in_steps_change_no_bit(tmp_path, capacity, keys):
    """Waiting and not, in steps that are done again and in validation."""
    keys = [*EP2, f"moe.capacity={capacity}", *keys]
    want = train(tmp_path, "as-it-is", 2, *keys)
    got = train(tmp_path, "in-steps", 2, *keys, plant=in_steps(tmp_path, cramp(2, 3, 5)))
    assert computed(got) == computed(want)
    assert redone(got) == (3 if capacity == "auto" else 0)
    for rank in range(2):
        lines = (tmp_path / f"rows.{rank}").read_text().splitlines()
        pairs = [tuple(map(int, line.split())) for line in lines]
        lost = [rows for rows, needed in pairs if rows < needed]
        assert bool(lost) == (capacity == "auto")
        assert set(lost) <= {BLOCK}, "what `cramp` leaves"
        enough = [(rows, needed) for rows, needed in pairs if rows >= needed]
        assert all(rows % STEP == 0 for rows, _ in enough)
        assert any(needed % STEP for _, needed in enough)


@pytest.mark.parametrize(
    ("ranks", "keys"), [(2, EP2), pytest.param(4, EP4, marks=pytest.mark.slow)]
)
def test_a_router_that_crowds_an_expert_is_obeyed(tmp_path, ranks, keys):
    """Twice: after the first time there is room for it."""
    plant = crowd(2, 5)
    want = train(tmp_path, "null", ranks, "moe.capacity=null", *keys, plant=plant)
    got = train(tmp_path, "auto", ranks, "moe.capacity=auto", *keys, plant=plant)
    assert computed(got) == computed(want)
    redone = [row["moe/redone_steps"] for row in got]
    # With a few rows an expert, what one step needed may be too little for the next.
    assert redone[0] == 0
    assert redone[2:] == [1, 0, 0, 0, 0]
    assert "moe/room" not in got[0], "the first step waits"
    assert got[3]["moe/room"] > got[2]["moe/room"] >= 1
    assert {row["moe/dropped_rows"] for row in got} == {0}
    loads = [row["moe/max_expert_load"] for row in got]
    assert min(loads[2], loads[5]) > ranks / 2  # of two experts on each rank


@pytest.mark.parametrize(
    ("ranks", "keys", "tight"),
    [(2, EP2, {1: 1.9}), pytest.param(4, EP4, {1: 4.06, 2: 4.04}, marks=pytest.mark.slow)],
)
def test_a_step_whose_room_would_not_fit_waits(tmp_path, ranks, keys, tight):
    """Ranks have used different amounts of memory, and some have less; all wait, or none."""
    # What is tight depends on the text, which must not change with the code.
    keys = [*keys, "train.steps=10", "train.log_every=1", "data.path=LICENSE"]

    def plant(rank: int) -> None:
        crowd(3)(rank)
        limit(tight, even=2 * 128 * 2, layers=2)(rank)

    want = train(tmp_path, "null", ranks, "moe.capacity=null", *keys, plant=crowd(3))
    got = train(tmp_path, "auto", ranks, "moe.capacity=auto", *keys, plant=plant)
    assert computed(got) == computed(want)
    # The crowded step had the room of the one before, and is done again; with `limit` its need is
    # remembered for three steps.
    assert [row["moe/waited_steps"] for row in got] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert got[3]["moe/redone_steps"] == 1
    assert not any("moe/waited_steps" in row for row in want)
    said = (tmp_path / "auto.log").read_text().count("would not fit into a GPU's memory")
    assert said == 1, "once, by rank 0"


@pytest.mark.slow
def test_auto_and_null_may_be_exchanged_on_resume(tmp_path):
    keys = [*EP2, "train.log_every=2", "checkpoint.every=3", "checkpoint.keep=3"]
    want = computed(train(tmp_path, "null", 2, "moe.capacity=null", *keys))
    for before, after, again in (
        ("auto", "null", [0, None, None, None]),
        ("null", "auto", [None, 0, 2, 0]),
        # The third step's is kept with the checkpoint after it, between two lines of metrics.
        ("auto", "auto", [0, 1, 2, 0]),
    ):
        name = f"{before}-{after}"
        train(tmp_path, name, 2, f"moe.capacity={before}", *keys, plant=cramp(2, 4))
        forget(tmp_path / name, 3)
        got = train(tmp_path, name, 2, f"moe.capacity={after}", *keys, plant=cramp(4, 5))
        assert checkpoints(tmp_path / name)[-1] == 7
        assert computed(got) == want
        assert [row.get("moe/redone_steps") for row in got] == again


def test_what_drops_nothing_is_the_same_training(tmp_path):
    def config_of(capacity: str) -> Config:
        return config_with(f"moe.capacity={capacity}")

    names = ("null", "auto", "default")
    for one in names:
        there = config_of(one).model_dump(mode="json")
        path = write_checkpoint(tmp_path / one, there)
        for other in names:
            check_checkpoint(path, config_of(other), 1)
        with pytest.raises(ConfigError, match=r"moe\.capacity: .* there, 1\.5 now"):
            check_checkpoint(path, config_of("1.5"), 1)
