"""Training speed of the paths and of stock megatron-core, each at its own best micro-batch.

    python -m scripts.bench.train configs/qwen3_30b_a3b_8l.yaml --gpus 2 \\
        [--stacks bf16,fp8_direct:prepare,stock:bf16:experimental] [--anchors bf16,stock:bf16] \\
        [--routings balanced,natural] [--screen 1,2,4,8] [--repeats 5] [--steps 20] [--warmup 20] \\
        [--minutes 25] [--ahead] [--sitting NAME] [--out docs/results] [key=value ...]

Stacks are named as scripts/bench/stacks/spec.py says. All have the same ranks, shape, batches,
AdamW and routing. Each runs in processes of its own (scripts/bench/measure/), so that none is
affected by another's memory:

1. Each is screened once, at the micro-batches of `--screen`, unless that names only one: the best
   has most tokens a second, each short window's longest step left out.
2. At its best micro-batch, each is measured `--repeats` times. From repeat to repeat the order is
   rotated, and reversed every second time, so that it favours no stack.

Writes `train_<config>.json` after every process. What has been measured is not measured again: with
`--minutes` a long plan is spread over several sittings, each on one machine. Every sitting also
measures the anchors, and rows name their sitting: speeds are compared within a sitting, in which a
row's windows have one length. The same command on the same machine continues the last sitting.
What each field of a row is, and how to measure one row again: scripts/bench/train/rows.py.

`--ahead` starts each process when the one before it has its turn: it loads its libraries while the
other builds its stack and compiles kernels, which saves that time, and does not touch the GPUs
before its own turn. The other times no step before they are loaded, or 90 seconds have passed.

Natural routing (`--routings natural`) trains the real router on the config's text and drops
nothing: `moe.capacity` is its default, or null with the flag `waits`. Balanced routing is forced,
on random tokens.

On a CPU, to see it work:

    python -m scripts.bench.train configs/demo_cpu.yaml --gpus 2 --stacks bf16,fp8_direct \\
        --screen 2 --repeats 1 --steps 2 --warmup 1 --out /tmp/bench

A stack that fails gets a row with `error` and is not repeated; the others continue. Exit codes: 0
done, or the minutes are over; 2 bad input, reported in one line; 130 after Ctrl-C. No process is
left behind.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.config import PATH_NAMES
from scripts.bench.command import or_one_line, positive, positive_list, positive_minutes
from scripts.bench.measure.window import WARMUP
from scripts.bench.stacks.spec import ROUTINGS, Spec, config_of, parse_all
from scripts.bench.train import rows as train_rows
from scripts.bench.train.process import Task
from scripts.bench.train.sitting import PROCESS_MINUTES, Sitting
from train.config import Config, ConfigError, check_world
from train.whole_file import check_out

DEFAULT_STACKS = ",".join((*PATH_NAMES, "stock:bf16", "stock:fp8"))
SCREEN_STEPS, SCREEN_WARMUP = 5, 6


def bench(arguments: argparse.Namespace) -> int:
    """Measure what is missing. Raises ConfigError before anything starts."""
    specs = parse_all(arguments.stacks)
    anchors = parse_all(arguments.anchors) if arguments.anchors else []
    specs += [anchor for anchor in anchors if anchor not in specs]
    configs = {
        routing: {spec: _config(arguments, spec, routing) for spec in specs}
        for routing in arguments.routings
    }
    path = arguments.out / f"train_{Path(arguments.config).stem}.json"
    check_out(path)
    try:
        content = train_rows.read(path, _empty_file(arguments))
    except json.JSONDecodeError as error:
        raise ConfigError(f"--out: {path} is not a whole JSON file: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out: {error}") from None
    sitting = Sitting(arguments, content, path)
    if arguments.minutes and arguments.minutes <= PROCESS_MINUTES:
        few = f"--minutes {arguments.minutes}"
        raise ConfigError(f"{few}: {PROCESS_MINUTES} are for the first process alone; give more")
    for routing in arguments.routings:
        sitting.check_lengths(configs[routing], routing)
    for routing in arguments.routings:
        if not measure_routing(sitting, routing, configs[routing], anchors):
            print(f"too little is left of {arguments.minutes} minutes; the same command continues")
            break
    table(content, sitting.name, path)
    return 0


def _config(arguments: argparse.Namespace, spec: Spec, routing: str) -> Config:
    """A stack's, at the last of its micro-batches. Raises ConfigError where any cannot be run."""
    for size in arguments.screen:
        config = config_of(spec, arguments.config, arguments.overrides, routing, size)
        check_world(config, arguments.gpus)
    return config


def _empty_file(arguments: argparse.Namespace) -> dict[str, Any]:
    """The results before anything is measured."""
    base = config_of(Spec("ours", "bf16"), arguments.config, arguments.overrides, "balanced", None)
    return {
        "machine": None, "versions": None, "commit": None,
        "config": base.model_dump(mode="json"),
        "bench": {"warmup_steps": arguments.warmup, "steps": arguments.steps,
                  "repeats": arguments.repeats, "screen_steps": SCREEN_STEPS},
        "sittings": {}, "screening": [], "rows": [],
    }  # fmt: skip


def measure_routing(
    sitting: Sitting, routing: str, configs: dict[Spec, Config], anchors: Sequence[Spec]
) -> bool:
    """What is missing of one routing, screening first; whether there was time for all of it."""
    content = sitting.content
    if not sitting.run(_screens(sitting, routing, configs), content["screening"]):
        return False
    return sitting.run(_windows(sitting, routing, configs, anchors), content["rows"])


def _screens(sitting: Sitting, routing: str, configs: dict[Spec, Config]) -> list[Task]:
    """A short window at each micro-batch, of each stack that has none; none for one micro-batch."""
    arguments, screening = sitting.arguments, sitting.content["screening"]
    if len(arguments.screen) == 1:
        return []
    return [
        Task(spec, routing, config, tuple(arguments.screen), SCREEN_STEPS, SCREEN_WARMUP)
        for spec, config in configs.items()
        if not any(train_rows.is_of(row, spec, routing, arguments.gpus) for row in screening)
    ]


def _windows(
    sitting: Sitting, routing: str, configs: dict[Spec, Config], anchors: Sequence[Spec]
) -> list[Task]:
    """A window for each repeat that is missing, at each stack's best micro-batch, in turn."""
    arguments, content = sitting.arguments, sitting.content
    gpus, steps, warmup = arguments.gpus, arguments.steps, arguments.warmup
    only = arguments.screen[0] if len(arguments.screen) == 1 else None
    sizes = {
        spec: size
        for spec in configs
        if (size := only or train_rows.best_micro_batch(content["screening"], spec, routing, gpus))
    }

    def done(spec: Spec, name: str | None = None) -> int:
        return train_rows.repeats_of(content["rows"], spec, routing, gpus, name)

    todo = [spec for spec in sizes if done(spec) < arguments.repeats]
    if not todo:
        return []
    todo += [spec for spec in anchors if spec in sizes and spec not in todo]
    return [
        Task(spec, routing, configs[spec], (sizes[spec],), steps, warmup)
        for repeat in range(arguments.repeats)
        for spec in in_turn(todo, repeat)
        if done(spec, sitting.name) <= repeat
    ]


def in_turn(specs: Sequence[Spec], repeat: int) -> list[Spec]:
    """The stacks in this repeat's order: rotated by one each time, and every second time backward.

    In twice as many repeats as there are stacks, each runs before any other as often as after it.
    """
    start = repeat // 2 % len(specs)
    order = [*specs[start:], *specs[:start]]
    return order[::-1] if repeat % 2 else order


def table(content: dict[str, Any], sitting: str, path: Path) -> None:
    """What this sitting measured, for the terminal."""
    # A log file gets the whole table, whatever the width of a terminal.
    console = Console(width=None if sys.stdout.isatty() else 150)
    shown = Table(title=f"{path}, sitting {sitting}")
    for name in ("stack", "routing", "micro-batch", "repeats", "ms/step", "from", "to",
                 "tokens/s/GPU", "TFLOP/s/GPU", "peak GiB", "dropped"):  # fmt: skip
        shown.add_column(name, justify="left" if name in ("stack", "routing") else "right")
    for row in content["rows"]:
        if row["sitting"] != sitting:
            continue
        cells = [str(Spec.of(row)), row["routing"], str(row["micro_batch"]), str(row["repeats"])]
        if "step_ms" not in row:
            shown.add_row(*cells, row["error"].partition(":")[0])
            continue
        ms = row["step_ms"]
        peak = row.get("peak_allocated_gib", {}).get("median")
        shown.add_row(
            *cells,
            *(f"{ms[key]:.1f}" for key in ("median", "min", "max")),
            f"{row['tokens_per_sec_per_gpu']['median']:,.0f}",
            f"{row['tflops_per_gpu']['median']:.4g}",
            "" if peak is None else f"{peak:.1f}",
            str(row["dropped_rows"]),
        )
    console.print(shown)


def _routings(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(ROUTINGS):
        raise argparse.ArgumentTypeError(f"{unknown.pop()}: known are {', '.join(ROUTINGS)}")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, such as configs/qwen3_30b_a3b_8l.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="overrides for all stacks"
    )
    parser.add_argument("--gpus", type=positive, required=True, help="ranks, on this machine")
    parser.add_argument("--stacks", default=DEFAULT_STACKS, help="default: %(default)s")
    parser.add_argument("--anchors", default="", help="stacks measured in every sitting")
    parser.add_argument("--routings", type=_routings, default=["balanced"],
                        help="balanced (default), natural, or both with a comma")  # fmt: skip
    parser.add_argument("--screen", type=positive_list, default=[1, 2, 4, 8], metavar="N,N",
                        help="micro-batches to try first; 1,2,4,8")  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=5,
                        help="processes of each stack at its best micro-batch; 5")  # fmt: skip
    parser.add_argument("--steps", type=positive, default=20, help="timed steps of a repeat; 20")
    parser.add_argument("--warmup", type=positive, default=WARMUP,
                        help=f"steps before them; {WARMUP}")  # fmt: skip
    parser.add_argument(
        "--minutes", type=positive_minutes, help="begin no process that might end later"
    )
    parser.add_argument("--ahead", action="store_true",
                        help="let the next process load its libraries meanwhile")  # fmt: skip
    parser.add_argument(
        "--process-minutes", type=positive_minutes, default=6, help="at most, of a process"
    )
    parser.add_argument("--sitting", help="its name; default: the last one, on the same machine "
                        "since its start at the same commit, or the time")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("docs/results"),
                        help="folder of the JSON file; docs/results")  # fmt: skip
    arguments = parser.parse_intermixed_args(argv)
    try:
        return or_one_line(lambda: bench(arguments))
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
