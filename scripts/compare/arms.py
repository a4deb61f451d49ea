"""Repeats: the runs of one configuration together are one side of a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.compare.noise import Ratio, compare
from scripts.compare.runs import Run, config_differences, flatten

REPEAT_MAY_DIFFER = ("run.", "tracking.", "train.seed")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a configuration, run once or more."""

    name: str
    runs: list[Run]

    @property
    def path(self) -> str:
        return self.runs[0].path

    def speeds(self) -> list[list[float]]:
        """tokens/s of every logging interval after the warm-up, run by run."""
        return [run.finite("throughput/tokens_per_sec") for run in self.runs]

    def speed_ratio(self, other: "Arm") -> Ratio | None:
        return compare(self.speeds(), other.speeds())


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """The runs by configuration, in order of appearance.

    A side of one run has its name. One of several is named after its path, or after its first run
    where two sides share a path.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        keys = flatten(run.config.model_dump(mode="json"))
        same = {key: v for key, v in keys.items() if not key.startswith(REPEAT_MAY_DIFFER)}
        # Speeds of different machines are never one sample.
        grouped.setdefault(f"{run.machine} {same}", []).append(run)
    sides = list(grouped.values())
    paths = [side[0].path for side in sides]
    arms = []
    for side in sides:
        repeated = len(side) > 1 and paths.count(side[0].path) == 1
        arms.append(Arm(side[0].path if repeated else side[0].name, side))
    return arms


def arm_of(arms: Sequence[Arm], run: Run) -> Arm:
    return next(arm for arm in arms if any(one is run for one in arm.runs))


def arm_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The keys in which these runs differ and repeats do not, with each run's value."""
    return [
        (key, values)
        for key, values in config_differences(runs)
        if not key.startswith(REPEAT_MAY_DIFFER)
    ]
