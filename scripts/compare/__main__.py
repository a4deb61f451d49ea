"""Compare runs: one table, `compare.png`, `compare.json`, a self-contained `compare.html`.

    python -m scripts.compare runs/A runs/B [...] [--out DIR] [--baseline NAME]
    python -m scripts.compare --group GROUP [--runs DIR]

Needs each run's `config.yaml` and `metrics.jsonl`, and nothing from the network or a GPU. Runs of
one configuration, or that differ in the seed alone, count as repeats of each other.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from scripts import terminal
from scripts.compare.arms import Arm, arm_differences, arm_of, group_arms
from scripts.compare.page.page import make_html
from scripts.compare.picture import make_png
from scripts.compare.printed import print_table
from scripts.compare.reading import on_cpu, reading, speed_verdicts, warnings
from scripts.compare.runs import InputError, Run, choose_baseline, find_group, read_runs
from scripts.compare.table import Row, make_table
from train.whole_file import whole

SERIES = ("loss/train", "moe/max_expert_load", "moe/load_entropy")
"""What a row of compare.json has step by step."""


def make_json(
    runs: Sequence[Run], arms: Sequence[Arm], baseline: Arm, table: Sequence[Row]
) -> dict[str, Any]:
    """The comparison as data: what the table and the pictures show, and where it comes from.

    In `rows`, runs that are repeats of each other share their `arm`; `differs` has the keys in
    which the sides differ, with the run's values; a list has a value for each logged step.
    """
    first = runs[0]
    differences = arm_differences(runs)
    return {
        "machine": first.machine,
        "versions": first.environment.get("versions"),
        "commit": first.environment.get("commit"),
        "config": first.config.model_dump(mode="json"),
        "baseline": baseline.name,
        "speed": [
            {
                "arm": verdict.arm.name,
                "runs": [run.name for run in verdict.arm.runs],
                "ratio": verdict.ratio.value,
                "interval": [verdict.ratio.low, verdict.ratio.high],
                "verdict": "says nothing about GPUs" if on_cpu(runs) else verdict.short,
            }
            for verdict in speed_verdicts(arms, baseline)
        ],
        "reading": reading(runs, arms, baseline),
        "rows": [
            {
                "run": run.name,
                "folder": str(run.folder),
                "arm": arm_of(arms, run).name,
                "differs": {key: values[index] for key, values in differences},
                **{row.label: row.cells[index].text for row in table},
                "tokens": list(run.series("progress/tokens").values()),
                **{name: list(values) for name in SERIES if (values := run.series(name).values())},
            }
            for index, run in enumerate(runs)
        ],
    }


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, reported in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare",
        description="Compare runs: one table, compare.png, compare.json and compare.html.",
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, such as runs/NAME")
    parser.add_argument("--group", help="all runs of this experiment (run.group), below --runs")
    parser.add_argument(
        "--runs", dest="parent", type=Path, metavar="DIR", help="with --group: where (runs)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default: compare, beside them)"
    )
    parser.add_argument(
        "--baseline", help="run or path that gaps and speeds refer to (default: bf16)"
    )
    options = parser.parse_args(arguments)
    console = console or Console()
    try:
        runs = _find_runs(options.runs, options.group, options.parent)
        first = choose_baseline(runs, options.baseline)
        out = options.out or _beside([run.folder for run in runs])
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: {error.strerror}") from None
    except (InputError, OSError) as error:  # the latter of a folder of somebody else
        print(f"compare: {error}", file=sys.stderr)
        return 2

    arms = group_arms(runs)
    runs = [run for arm in arms for run in arm.runs]  # repeats side by side
    baseline = arm_of(arms, first)
    table = make_table(runs, baseline)
    data = json.dumps(make_json(runs, arms, baseline, table), indent=1) + "\n"
    files = {
        "compare.png": make_png(runs, baseline),
        "compare.html": make_html(runs, arms, baseline, table, out).encode(),
        "compare.json": data.encode(),
    }
    for name, content in files.items():
        try:
            with whole(out / name) as new:
                new.write_bytes(content)
        except OSError as error:
            print(f"compare: {out / name} cannot be written: {error.strerror}", file=sys.stderr)
            return 2

    print_table(console, runs, table)
    for text in reading(runs, arms, baseline):
        console.print(f"- {text}", markup=False)
    for text in warnings(runs):
        console.print(f"! {text}", markup=False)
    for name in ("compare.html", "compare.png"):
        console.print(str(out / name), markup=False, soft_wrap=True)
    return 0


def _find_runs(folders: Sequence[Path], group: str | None, parent: Path | None) -> list[Run]:
    """Read the runs that were asked for. Raises InputError."""
    if folders and group:
        raise InputError(f"give run folders or --group {group}, not both")
    if group:
        parent = parent or Path("runs")
        runs = find_group(parent, group)
        if not runs:
            raise InputError(f"no run of group {group} below {parent}")
        return runs
    if not folders:
        raise InputError("which runs? give run folders, or --group NAME")
    if parent is not None:
        raise InputError(f"--runs {parent} is where a --group is looked for; leave it out")
    return read_runs(folders)


def _beside(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([folder.absolute().parent for folder in folders])) / "compare"


if __name__ == "__main__":
    terminal.run(main)
