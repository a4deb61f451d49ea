"""Run folders as GPUs would leave them, with made-up figures, for tests of the comparison."""

import json
import random
from pathlib import Path

from tests.compare.test_compare import STEPS, write_run

PARTS = {  # milliseconds of a step, for bf16 and the FP8 paths
    "quantize": (0, 3), "dispatch": (22, 12), "permute": (6, 5), "relayout": (0, 1.4),
    "up_projection": (40, 27), "swiglu": (7, 7), "down_projection": (21, 15), "combine": (20, 20),
    "dgrad": (62, 44), "wgrad": (61, 58), "attention": (70, 70), "optimizer": (18, 18),
    "gradient_sync": (25, 25),
}  # fmt: skip


def write_gpu_run(
    folder: Path, path: str, speed: float, seed: int = 0, noise: float = 0.01
) -> Path:
    """A run at about `speed` tokens/s, whose intervals vary by `noise`; profiled every fifth."""
    chance = random.Random(f"{path} {seed}")
    fp8 = path != "bf16"
    relayouts = {"fp8_baseline": 5.0, "fp8_compact": 2.0}.get(path, 0.0)
    losses = [2 + 3 * 0.98 ** (step / 2) + 0.004 * fp8 + chance.gauss(0, 0.01) for step in STEPS]
    write_run(folder, path, losses, config={"train": {"seed": seed}, "run": {"group": "made-up"}})
    lines = []
    for index, line in enumerate((folder / "metrics.jsonl").read_text().splitlines()):
        here = speed * (1 + chance.gauss(0, noise))
        row = json.loads(line) | {
            "throughput/tokens_per_sec": here,
            "throughput/tokens_per_sec_per_gpu": here / 2,
            "throughput/tflops_per_gpu": here / 400,
            "throughput/mfu": here / 400 / 989.4,
            "time/step_ms": 15e6 / here,
            "time/data_ms": 0.4,
            "memory/peak_allocated_gib": 71.5 - 9 * fp8 + chance.gauss(0, 0.02),
            "moe/scale_relayouts": relayouts,
            "moe/scale_relayouts_backward": relayouts,
            "moe/kept_mib": 96.0 - 40 * fp8,
            "moe/max_expert_load": 1.3 + chance.random() / 10,
            "moe/dropped_rows": 0.0,
            "optim/grad_norm": 1 + chance.random(),
        }
        if index % 5 == 4:
            for name, times in PARTS.items():
                if times[fp8] and not (name == "relayout" and not relayouts):
                    row[f"time/{name}_ms"] = times[fp8] * (1 + chance.gauss(0, noise))
            parts = sum(v for k, v in row.items() if k.startswith("time/")) - row["time/step_ms"]
            row["time/other_ms"] = max(0.0, row["time/step_ms"] + 0.4 - parts)
            row["loss/valid"] = row["loss/train"] + 0.05
        lines.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    load = [[max(0.0, chance.gauss(1, 0.35)) for _ in range(32)] for _ in range(6)]
    row = {"progress/step": STEPS[-1], "moe/expert_load": load}
    (folder / "routing.jsonl").write_text(json.dumps(row) + "\n")
    return folder
