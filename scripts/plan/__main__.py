"""Plan a run before it starts, on any machine: does it fit, how fast is it, and what bounds it.

    python -m scripts.plan configs/qwen3_30b_a3b.yaml --gpus 64 [--gpus-per-node 8]
        [--machine h100] [--picture plan.png] [key=value ...]

Prints, for every path: a rank's memory by part, the largest micro-batch that fits, what it sends in
a step over which link, and how long a step takes. `--picture` draws it from 8 to 1024 GPUs. Memory
is counted tensor by tensor; times are from kernels measured in docs/results (docs/planning.md).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from scripts import terminal
from scripts.plan.machines import MACHINES
from scripts.plan.picture import COUNTS, draw
from scripts.plan.plan import plans, scaled
from scripts.plan.rates import measured
from scripts.plan.table import render
from scripts.plan.time import fitted
from train.config import ConfigError, load
from train.planning.memory import FIT


def count(text: str) -> int:
    """An argument that is a number of GPUs."""
    with suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of GPUs")


def errors() -> str:
    """How far plans were from measured steps, in one line."""
    fit = json.loads(FIT.read_text(encoding="utf-8"))

    def worst(unit: str, role: str) -> str:
        found = (abs(r[f"error_{unit}"]) for r in fit["rows"] if r.get(f"role_{unit}") == role)
        return f"{max(found, default=0):.1%}"

    return (
        f"on measured steps that nothing was fitted on ({fit['machine']}), memory was off by "
        f"{worst('gib', 'checked')} at most and time by {worst('ms', 'checked')}, and by "
        f"{worst('gib', 'assumed')} and {worst('ms', 'assumed')} where the router chooses and an "
        "imbalance is assumed; what goes over a network was not measured"
    )


def run(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    picture: Path | None = options.picture
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise ConfigError(f"--picture {picture} must end in .png or .svg")
    config = load(options.config, options.keys)
    machine = MACHINES[options.machine]
    gpus = options.gpus or config.parallel.expert_parallel
    node = options.gpus_per_node
    if gpus > node and gpus % node:
        raise ConfigError(f"--gpus {gpus} is not a multiple of --gpus-per-node {node}")
    try:
        rates, fit = measured(), fitted()
        said = errors()
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"docs/results has not what a plan is made from ({type(error).__name__}: {error}); "
            "python -m scripts.plan.fit writes plan_fit.json"
        ) from None
    found = plans(config, gpus, node, machine, rates, fit)
    print(render(config, gpus, machine, found, said))
    if picture is None:
        return
    many = scaled(config, gpus, node, COUNTS, machine, rates, fit)
    if not many:
        raise ConfigError(
            f"--picture {picture}: none of {', '.join(map(str, COUNTS))} GPUs can run this config; "
            f"set parallel.expert_parallel={config.parallel.expert_parallel} to a divisor"
        )
    title = f"{Path(options.config).stem}, micro-batch {config.train.micro_batch}"
    try:
        draw(picture, title, machine, many, config.moe.path)
    except OSError as error:
        raise ConfigError(f"--picture {picture} cannot be written: {error.strerror}") from None
    print(f"\n{picture}: {', '.join(map(str, many))} GPUs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, reported in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, such as configs/moe_small.yaml")
    parser.add_argument(
        "keys",
        nargs="*",
        default=[],
        metavar="key=value",
        help="overrides, such as train.micro_batch=8",
    )
    parser.add_argument(
        "--gpus", type=count, metavar="N", help="GPUs of the run (parallel.expert_parallel)"
    )
    parser.add_argument(
        "--gpus-per-node", type=count, default=8, metavar="M", help="GPUs of a node (8)"
    )
    parser.add_argument(
        "--machine", choices=MACHINES, default="h100", help="GPU to plan for (h100)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png|svg")
    options = parser.parse_intermixed_args(arguments)
    try:
        run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    terminal.run(main)
