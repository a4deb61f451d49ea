"""How long a save stops training: the demo on two processes, saved every fifth step.

    python -m scripts.bench.checkpoint [--steps 150]
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

from scripts.bench.checkpoint import disk
from scripts.bench.machine import describe_machine
from scripts.bench.results import spread, write_json

RESULT = Path("docs/results/checkpoint_demo.json")
WARMUP = 2
"""First lines of metrics that are left out."""


def measure_stops(steps: int) -> int:
    """Train the demo and read from its metrics how long each save stopped it; writes `RESULT`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "-m", "train", "configs/demo_cpu.yaml"]
        command += [f"run.dir={folder}", "run.name=a", f"train.steps={steps}"]
        command += ["train.device=cpu", "train.valid_every=0", "tracking.mode=disabled"]
        command += ["train.log_every=5", "checkpoint.every=5"]
        subprocess.run(command, check=True)
        lines = (Path(folder) / "a" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    first = next(row["time/checkpoint_ms"] for row in rows if "time/checkpoint_ms" in row)
    step_ms = [row["time/step_ms"] for row in rows[WARMUP:]]
    stops = [row["time/checkpoint_ms"] for row in rows[WARMUP:]]
    share = statistics.median(stops) / statistics.median(step_ms)
    write_json(
        RESULT,
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
    print(f"{RESULT}: a save stops training for {share:.1%} of a step (medians)")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--disk", type=Path, metavar="FOLDER", help="measure this disk instead")
    parser.add_argument("--gb", type=float, default=2.0, help="GB of state on every rank (2)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the state is"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="with --disk: where the result goes")
    options = parser.parse_args()
    if not options.disk:
        return measure_stops(options.steps)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    out = options.out or RESULT.with_name(f"checkpoint_disk_{device.type}.json")
    return disk.run(device, options.gb, options.disk, options.repeats, out)


if __name__ == "__main__":
    sys.exit(main())
