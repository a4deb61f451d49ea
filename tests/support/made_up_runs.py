"""Run folders as training leaves them, with made-up figures, for tests of the comparison."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

STEPS = list(range(10, 210, 10))  # 20 logged steps, so that the last tenth is two

PARTS = {  # milliseconds of a step, for bf16 and the FP8 paths
    "quantize": (0, 3), "dispatch": (22, 12), "permute": (6, 5), "relayout": (0, 1.4),
    "up_projection": (40, 27), "swiglu": (7, 7), "down_projection": (21, 15), "combine": (20, 20),
    "dgrad": (62, 44), "wgrad": (61, 58), "attention": (70, 70), "optimizer": (18, 18),
    "gradient_sync": (25, 25),
}  # fmt: skip


def write_run(
    folder: Path,
    path: str,
    losses: Sequence[float | None] | None = None,
    metrics: Mapping[str, float] | None = None,
    device: str | None = "cuda",
    device_name: str = "NVIDIA H100 80GB HBM3",
    config: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """A run's folder as training leaves it; `metrics` are logged at every step."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": folder.name},
        "model": {
            "num_layers": 1,
            "hidden_size": 128,
            "num_heads": 2,
            "num_kv_heads": 1,
            "vocab_size": 257,
            "seq_len": 16,
        },
        "moe": {"path": path, "num_experts": 4, "top_k": 2, "ffn_hidden_size": 128},
        "optim": {"lr": 1e-3},
        "train": {"steps": 200, "micro_batch": 1},
    }
    for section, keys in (config or {}).items():
        tree.setdefault(section, {}).update(keys)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    losses = losses if losses is not None else [5 - step / 100 for step in STEPS]
    rows = []
    for step, loss in zip(STEPS, losses, strict=False):
        row = {"progress/step": step, "progress/tokens": step * 32, "loss/train": loss}
        rows.append(row | dict(metrics or {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if device is not None:
        environment = {
            "device": device,
            "device_name": device_name,
            "world_size": 2,
            "versions": {"torch": "2.11"},
            "commit": "abc123",
        }
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


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
