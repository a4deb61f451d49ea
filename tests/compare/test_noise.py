"""What is called noise: on made-up speeds whose truth is known."""

import random
from pathlib import Path

import numpy as np
import pytest

from scripts.compare.arms import group_arms
from scripts.compare.noise import FEWEST, centre, compare, mean_interval, mean_interval_of_runs
from scripts.compare.reading import warnings
from scripts.compare.runs import read_runs
from tests.compare.test_compare import reading_of
from tests.support.made_up_runs import write_run

Sides = list[list[float]]


def speeds(generator: np.random.Generator, count: int, mean: float, tied: float) -> list[float]:
    """`count` intervals that vary by 2 %; `tied` is how much one follows the one before."""
    noise = generator.normal(size=count)
    for index in range(1, count):
        noise[index] = tied * noise[index - 1] + (1 - tied**2) ** 0.5 * noise[index]
    return list(mean * (1 + 0.02 * noise))


@pytest.mark.parametrize(("tied", "fewest"), [(0.0, 53), (0.5, 46)])
def test_equal_speeds_are_noise(tied: float, fewest: int) -> None:
    """About 95 % of 60 pairs with a true ratio of 1 are called noise; fewer where
    neighbours follow each other more than blocks of four make up for."""
    generator = np.random.default_rng(7)
    found = [
        compare([speeds(generator, 60, 100, tied)], [speeds(generator, 60, 100, tied)])
        for _ in range(60)
    ]
    assert fewest <= sum(ratio is not None and ratio.verdict == "noise" for ratio in found) < 60


def test_a_difference_larger_than_the_noise_is_found() -> None:
    generator = np.random.default_rng(7)
    for _ in range(20):
        ratio = compare([speeds(generator, 40, 105, 0.3)], [speeds(generator, 40, 100, 0.3)])
        assert ratio is not None
        assert ratio.verdict == "higher"
        assert 1.03 < ratio.value < 1.07
        assert ratio.low < ratio.value < ratio.high
        back = compare([[1.0] * 40], [[1.05] * 40])
        assert back is not None
        assert back.verdict == "lower"


def test_runs_that_differ_more_than_their_intervals() -> None:
    """Each run is steady, but runs of one path lie 4 % apart: single runs mislead, repeats do
    not."""
    ours, theirs = ([[level + 0.01 * i for i in range(20)] for level in levels] for levels in (
        (100.0, 104.0, 102.0), (101.0, 103.0, 105.0)))  # fmt: skip
    alone = compare(ours[:1], theirs[:1])
    assert alone is not None
    assert (alone.verdict, alone.repeats) == ("lower", 1)
    together = compare(ours, theirs)
    assert together is not None
    assert (together.verdict, together.repeats) == ("noise", 3)


def test_few_intervals_say_nothing() -> None:
    ratio = compare([[110.0] * 4], [[100.0] * 50])
    assert ratio is not None
    assert ratio.verdict == "unknown"
    assert compare([[]], [[1.0]]) is None
    assert compare([[], [2.0] * 5], [[1.0] * 5]) == compare([[2.0] * 5], [[1.0] * 5])


def test_the_same_input_gives_the_same_answer() -> None:
    chance = random.Random(0)
    side: Sides = [[chance.random() for _ in range(30)]]
    assert compare(side, side) == compare(side, side)


def test_centre_is_of_runs_not_of_intervals() -> None:
    assert centre([[1.0] * 100, [4.0], [16.0]]) == pytest.approx(4)


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_equal_paths_run_several_times_are_noise(repeats: int) -> None:
    """At most about 5 % of 400 comparisons with a true ratio of 1 are called a difference."""
    generator = np.random.default_rng(3)
    wrong = 0
    for _ in range(400):
        sides = [
            [[level * 100] * FEWEST for level in 1 + 0.01 * generator.normal(size=repeats)]
            for _ in range(2)
        ]
        ratio = compare(*sides)
        assert ratio is not None
        wrong += ratio.verdict != "noise"
    assert wrong <= 0.07 * 400


def test_a_difference_between_repeats_is_found() -> None:
    ratio = compare([[103.0] * 9, [104.0] * 9, [105.0] * 9], [[99.0] * 9, [100.0] * 9, [101.0] * 9])
    assert ratio is not None
    # By hand: standard errors of 0.555 % and 0.577 %, 4 (3.99) degrees of freedom.
    assert ratio.verdict == "higher"
    assert ratio.value == pytest.approx(1.04, abs=1e-3)
    assert ratio.low == pytest.approx(1.04 * (1 - 3.18 * 0.008), abs=2e-3)


def test_mean_interval_of_runs_is_student_s() -> None:
    assert mean_interval_of_runs([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5)
    )


def test_mean_interval_holds_the_mean() -> None:
    values = [float(n % 7) for n in range(70)]
    low, high = mean_interval(values)
    assert low < 3 < high
    assert high - low < 2


def write_repeats(folder: Path, speed: dict[str, list[float]]) -> list[Path]:
    return [
        write_run(
            folder / f"{path}-{seed}",
            path,
            metrics={"throughput/tokens_per_sec": value},
            config={"train": {"seed": seed}},
        )
        for path, values in speed.items()
        for seed, value in enumerate(values)
    ]


def test_runs_that_differ_in_the_seed_are_repeats(tmp_path: Path) -> None:
    folders = write_repeats(tmp_path, {"bf16": [100.0, 104.0], "fp8_direct": [200.0, 204.0]})
    runs = read_runs(folders)
    arms = group_arms(runs)
    assert [(arm.name, len(arm.runs)) for arm in arms] == [("bf16", 2), ("fp8_direct", 2)]
    assert warnings(runs) == []
    said = reading_of(folders)
    # Two runs each leave one degree of freedom, and say accordingly little.
    assert said[0] == (
        "fp8_direct was faster than bf16: 98.1 % more tokens/s, outside the noise (ratio 1.981, "
        "95 % interval 1.498 to 2.618)."
    )
    assert not any("Not every path was run more than once" in sentence for sentence in said)


def test_another_learning_rate_is_no_repeat(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "bf16"),
        write_run(tmp_path / "b", "bf16", config={"optim": {"lr": 2e-3}}),
    ]
    assert [arm.name for arm in group_arms(read_runs(folders))] == ["a", "b"]


def test_one_seed_more_on_one_side_is_named(tmp_path: Path) -> None:
    folders = write_repeats(tmp_path, {"bf16": [100.0, 104.0], "fp8_direct": [200.0]})
    assert any("train.seed" in warning for warning in warnings(read_runs(folders)))
