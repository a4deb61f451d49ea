"""How long a save stops training: the demo on two processes, saved every fifth step.

    python -m scripts.bench.checkpoint [--steps 150] [--out FILE.json]
    python -m scripts.bench.checkpoint --disk FOLDER [--gb 2] [--device cuda] [--repeats 3]
    torchrun --nproc-per-node 2 -m scripts.bench.checkpoint --disk FOLDER --gb 11.5 --device cuda

The first writes docs/results/checkpoint_demo.json. The stop is how long a save delays the next
step: the start of the copy, and of the thread that writes it. The first save, which also allocates
the copy's memory, is reported separately.

With --disk: seconds to copy, hash and write a state of --gb on every rank to FOLDER, beside those
of `dd`; scripts/bench/checkpoint/disk.py says how. Writes docs/results/checkpoint_disk_DEVICE.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from scripts import terminal
from scripts.bench.checkpoint import disk
from scripts.bench.command import or_one_line, positive
from scripts.bench.machine import describe_machine
from scripts.bench.results import spread, write_json
from train.config import ConfigError
from train.whole_file import check_out

RESULT = Path("docs/results/checkpoint_demo.json")
WARMUP, EVERY = 2, 5
"""First lines of metrics that are left out; steps from a line to the next, and of a save."""


def measure_stops(steps: int, out: Path) -> int:
    """Train the demo and read from its metrics how long each save stopped it; writes `out`.

    Raises ConfigError where too few steps leave nothing to measure, or the demo fails.
    """
    if steps < (fewest := (WARMUP + 1) * EVERY):
        raise ConfigError(f"--steps {steps}: the saves of {fewest} steps are the fewest to measure")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "scripts.bench.torchrun", "--standalone"]
        command += ["--nproc-per-node=2", "-m", "train", "configs/demo_cpu.yaml"]
        command += [f"run.dir={folder}", "run.name=a", f"train.steps={steps}"]
        command += ["train.device=cpu", "train.valid_every=0", "tracking.mode=disabled"]
        command += [f"train.log_every={EVERY}", f"checkpoint.every={EVERY}"]
        if (status := subprocess.run(command).returncode) != 0:
            raise ConfigError(f"the demo, whose saves are measured, ended with status {status}")
        lines = (Path(folder) / "a" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    first = next(row["time/checkpoint_ms"] for row in rows if "time/checkpoint_ms" in row)
    step_ms = [row["time/step_ms"] for row in rows[WARMUP:]]
    stops = [row["time/checkpoint_ms"] for row in rows[WARMUP:]]
    share = statistics.median(stops) / statistics.median(step_ms)
    write_json(
        out,
        {
            **describe_machine(torch.device("cpu"), 2),
            "config": "configs/demo_cpu.yaml, 2 processes",
            "saves": len(stops),
            "step_ms": spread(step_ms),
            "stop_ms": spread(stops),
            "first_stop_ms": first,
            "stop_share_of_a_step": share,
        },
    )
    print(f"{out}: a save stops training for {share:.1%} of a step (medians)")
    return 0


def check_disk(options: argparse.Namespace) -> None:
    """Raises ConfigError, before any process group starts."""
    if options.gb <= 0:
        raise ConfigError(f"--gb {options.gb:g} is not positive")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here; leave --device out")
    try:
        options.disk.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--disk {options.disk}: {error.strerror}") from None


def run(options: argparse.Namespace) -> int:
    """Raises ConfigError."""
    if not options.disk:
        check_out(out := options.out or RESULT)
        return measure_stops(options.steps, out)
    check_disk(options)
    device = torch.device(options.device)
    check_out(out := options.out or RESULT.with_name(f"checkpoint_disk_{device.type}.json"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return disk.run(device, options.gb, options.disk, options.repeats, out)


def main() -> int:
    """Returns the exit status: 0, or 2 for bad input, reported in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=150, help="of the demo (150)")
    parser.add_argument("--disk", type=Path, metavar="FOLDER", help="measure this disk instead")
    parser.add_argument(
        "--gb", type=float, default=2.0, help="with --disk: GB of state on every rank (2)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="with --disk: where the state is"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="with --disk (3)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the result goes")
    options = parser.parse_args()
    return or_one_line(lambda: run(options))


if __name__ == "__main__":
    terminal.run(main)
