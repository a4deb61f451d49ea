"""The plan of a run: its memory, time and traffic with every path, on some number of GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.config import PATH_NAMES, PathName
from scripts.plan.machines import Machine
from scripts.plan.rates import Rates
from scripts.plan.time import Fit, bounds, parts_ms
from train.config import Config, ConfigError, check_world, with_keys
from train.metrics import flops
from train.planning.memory import Moment, budget, fits_if_it_waits, peak
from train.planning.shapes import Shape, shape_of

MOST = 128
"""Sequences of a micro-batch that are tried."""


@dataclass(frozen=True)
class Plan:
    """The plan of one path."""

    path: PathName
    shape: Shape
    memory: Moment
    room: float
    """Bytes that the plan may take of the GPU."""
    largest: int | None
    """The largest micro-batch that fits, of those that fill the global batch; None if none does."""
    ms: dict[str, float]
    """Milliseconds of a step, by part."""
    flops_per_token: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    @property
    def fits_by_waiting(self) -> bool:
        """Whether room for the experts' rows does not fit, and a step that waits does."""
        return not self.fits and fits_if_it_waits(self.shape, self.room)

    @property
    def verdict(self) -> str:
        """`fits` for a table."""
        return "yes" if self.fits else "waits" if self.fits_by_waiting else "NO"

    @property
    def step_ms(self) -> float:
        return sum(self.ms.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one GPU."""
        return self.shape.tokens * self.shape.micro_batches / self.step_ms * 1e3

    @property
    def tflops(self) -> float:
        """TFLOP/s of one GPU, as training logs them."""
        return self.tokens_per_second * self.flops_per_token / 1e12

    @property
    def bounds(self) -> dict[str, float]:
        """What a step is bound by, with its share of it, the largest first."""
        return bounds(self.ms)


def plans(
    config: Config, gpus: int, node: int, machine: Machine, rates: Rates, fit: Fit
) -> list[Plan]:
    """One for each path. Raises ConfigError where this many GPUs cannot run the config."""
    check_world(config, gpus)
    found = []
    for path in PATH_NAMES:
        of_path = with_keys(config, [f"moe.path={path}"])
        shape = shape_of(of_path, gpus, node)
        found.append(plan_of(of_path, shape, sizes(of_path, gpus), machine, rates, fit))
    return found


def sizes(config: Config, gpus: int) -> list[int]:
    """Micro-batches that fill the global batch, or all where it follows from them."""
    batch = config.train.global_batch
    return [size for size in range(1, MOST + 1) if batch is None or batch % (size * gpus) == 0]


def plan_of(
    config: Config,
    shape: Shape,
    micro_batches: Sequence[int],
    machine: Machine,
    rates: Rates,
    fit: Fit,
) -> Plan:
    """The plan of a shape; `micro_batches` are the candidates."""
    room = budget(machine.memory)
    fitting = [size for size in micro_batches if peak(_with(shape, config, size)).total <= room]
    return Plan(
        path=shape.moe.path,
        shape=shape,
        memory=peak(shape),
        room=room,
        largest=max(fitting, default=None),
        ms=parts_ms(shape, machine, rates, fit),
        flops_per_token=flops.count(config.model, config.moe).flops_per_token,
    )


def _with(shape: Shape, config: Config, micro_batch: int) -> Shape:
    """Another micro-batch, and as many of them as the global batch then takes."""
    batch = config.train.global_batch
    count = 1 if batch is None else batch // (micro_batch * shape.ranks)
    return replace(shape, micro_batch=micro_batch, micro_batches=count)


def scaled(
    config: Config,
    gpus: int,
    node: int,
    counts: Sequence[int],
    machine: Machine,
    rates: Rates,
    fit: Fit,
) -> dict[int, list[Plan]]:
    """Plans by number of GPUs, those of `counts` that can run the config; each GPU has as many
    micro-batches as with `gpus`, so the global batch grows."""
    count_of_batches = config.accumulation(gpus)
    free = with_keys(config, ["train.global_batch=null"])
    found: dict[int, list[Plan]] = {}
    for count in counts:
        try:
            check_world(free, count)
        except ConfigError:
            continue
        of_paths = [with_keys(free, [f"moe.path={path}"]) for path in PATH_NAMES]
        found[count] = [
            plan_of(
                one,
                replace(shape_of(one, count, node), micro_batches=count_of_batches),
                (),
                *(machine, rates, fit),
            )
            for one in of_paths
        ]
    return found
