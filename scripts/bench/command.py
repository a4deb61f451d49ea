"""What the commands have in common: counts as arguments, bad input in one line, process groups."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence

from train import parallel, preflight
from train.config import Config, ConfigError, check_world, world_size_from_env
from train.parallel import Ranks


def positive(text: str) -> int:
    """An argument that is a count."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def positive_list(text: str) -> list[int]:
    """Counts with commas between."""
    try:
        return list(dict.fromkeys(positive(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of counts with commas") from None


def positive_minutes(text: str) -> float:
    """An argument that is a time."""
    value = float(text)
    if not 0 < value < math.inf:  # NaN is not either
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def or_one_line(run: Callable[[], int]) -> int:
    """The exit code of `run`; where the config cannot be run, one line of the first rank, and 2."""
    try:
        return run()
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # torchrun ends all ranks with the first; rank 0 reports for them
        return 2


def prepare(configs: Sequence[Config]) -> None:
    """Before CUDA or TransformerEngine start: raises ConfigError where the ranks do not fit one of
    them, and makes GPUs deterministic where the first says so."""
    for config in configs:
        check_world(config, world_size_from_env())
    if configs[0].train.deterministic:
        preflight.make_deterministic()


def start(config: Config) -> Ranks:
    """The process groups of a config, on the device that it names. All ranks together."""
    return parallel.start(
        preflight.resolve_device(config),
        config.parallel.expert_parallel,
        config.train.seed,
        config.parallel.timeout_s,
    )
