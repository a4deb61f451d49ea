"""Measured steps of docs/results, each with the shape that a plan is made for."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from models.config import PATH_NAMES
from scripts.bench.results import Row
from scripts.bench.train.rows import SAME
from scripts.plan.machines import MACHINES, Machine
from scripts.plan.rates import WAITED
from train.config import Config
from train.planning.shapes import Shape, shape_of

FITTED_MEMORY = (("bf16", ("prepare",), 4), ("fp8_direct", ("prepare",), 4))
FITTED_TIME = (("bf16", ("prepare",), 4), ("bf16", ("prepare",), 8), ("fp8_compact", (), 4))
FITTED_FILE, FITTED_SITTING = "train_qwen3_30b_a3b_8l.json", "2026-11-26 04:32"
"""Rows of this file and sitting by path, flags and micro-batch, balanced and on two GPUs: figures
are fitted on them. All other rows are checked."""

ONE_GPU = "train_qwen3_30b_a3b_8l_1gpu.json"
"""The config of files that have none of their own; their rows override it."""

KNOWN_FLAGS = {"prepare", "recompute", "waits", "environment"}
"""Flags that a plan knows; rows with others, such as other operations, are not planned."""

ALONE = ("bf16_again",)
"""Runs of moe_small.json that had the GPU to themselves: the others' speed means nothing."""


@dataclass(frozen=True)
class Measured:
    """A measured step."""

    name: str
    source: str
    shape: Shape
    machine: Machine
    fits_memory: bool
    """Whether the memory is fitted on it, or checked."""
    fits_time: bool
    peak_gib: float | None
    step_ms: float | None
    is_assumed: bool = False
    """Whether the imbalance of the routing is assumed, as a plan cannot know it: no bound is
    demanded."""
    is_layer: bool = False
    """Whether it is of one layer's experts, and no step."""


def measured(results: Path) -> list[Measured]:
    """All that can be planned. Raises OSError, KeyError, ValueError for a broken file."""
    found: list[Measured] = []
    for path in sorted(results.glob("train_*.json")):
        found += _training(path)
    found += _losses(results / "moe_small.json")
    found += _layers(results / "moe_layer.json", results / ONE_GPU)
    found += _pairs(results / "pairs.json", results / ONE_GPU)
    return found


def _training(path: Path) -> Iterator[Measured]:
    result: Any = _read(path)
    names = set()
    for row in _repeated_or_screened(result):
        flags = tuple(row.get("flags", ()))
        known = row["path"] in PATH_NAMES and set(flags) <= KNOWN_FLAGS
        if row["stack"] != "ours" or "step_ms" not in row or not known or "operations" in row:
            continue
        sitting = result.get("sittings", {}).get(row.get("sitting"), result)
        routing = row.get("routing", "balanced")
        shape = _shape(result["config"], row, routing, flags)
        if shape is None:
            continue
        which = (row["path"], flags, row["micro_batch"])
        is_first = (path.name, row.get("sitting")) == (FITTED_FILE, FITTED_SITTING)
        is_first = is_first and routing == "balanced" and row["gpus"] == 2
        peak = row.get("peak_allocated_gib")
        machine = _machine(sitting["machine"])
        name = _name(path, row, routing, flags, machine)
        name += (name in names) * f", {row.get('sitting')}"
        names.add(name)
        yield Measured(
            name=name,
            source=path.name,
            shape=shape,
            machine=machine,
            fits_memory=is_first and which in FITTED_MEMORY,
            fits_time=is_first and which in FITTED_TIME,
            peak_gib=None if peak is None else peak["max"],
            # A plan does not know how often a step is repeated.
            step_ms=None if row.get("redone_steps") else row["step_ms"]["median"],
            is_assumed=routing == "natural" and shape.expert_ranks > 1,
        )


def _repeated_or_screened(result: Any) -> Iterator[Row]:
    """Every row, and what was screened and then not repeated in the same sitting."""
    keys = (*SAME, "micro_batch", "sitting")
    seen = []
    for row in [*result["rows"], *result.get("screening", ())]:
        key = [row.get(name) for name in keys]
        if key not in seen:
            yield row
        seen.append(key)


def _shape(
    tree: dict[str, Any], row: Row, routing: str, flags: tuple[str, ...], **model: int
) -> Shape | None:
    """The shape of the config that `config_of` of scripts/bench/stacks/spec.py makes; None for keys
    of another version."""
    tree = json.loads(json.dumps(tree))
    tree["moe"]["path"] = row["path"]
    tree["parallel"]["expert_parallel"] = row.get(
        "expert_parallel", tree["parallel"]["expert_parallel"]
    )
    if routing == "natural":
        tree["moe"] |= {"force_balance": False, "capacity": "default"}
    if "waits" in flags:
        tree["moe"]["capacity"] = None
    tree["moe"]["recompute"] = "recompute" in flags
    tree["optim"]["prepare_weights"] = "prepare" in flags
    tree["train"] |= {
        "micro_batch": row["micro_batch"],
        "global_batch": row.get("global_batch", row["micro_batch"] * row["gpus"]),
    }
    try:
        config = Config.model_validate(tree)
    except ValidationError:
        return None
    return shape_of(config, row["gpus"])


def _name(path: Path, row: Row, routing: str, flags: tuple[str, ...], machine: Machine) -> str:
    config = path.stem.removeprefix("train_").removesuffix("_1gpu")
    said = ", ".join([f"{config} `{row['path']}`", *flags])
    kind = "H100" if machine is MACHINES["h100"] else "H200"
    gpus = f"{row['gpus']} {kind}" + "s" * (row["gpus"] > 1)
    return f"{said}, micro-batch {row['micro_batch']}, {gpus}" + (
        "" if routing == "balanced" else f", {routing} routing"
    )


def _losses(path: Path) -> Iterator[Measured]:
    """The rows of moe_small.json: training runs on one GPU."""
    result = _read(path)
    for row in result["rows"]:
        tree = result["config"]
        tree["moe"]["path"] = row["path"]
        shape = shape_of(Config.model_validate(tree), 1)
        alone = row["run"] in ALONE
        yield Measured(
            name=f"moe_small `{row['path']}`" + (", again" if alone else "") + ", 1 GPU",
            source=path.name,
            shape=shape,
            machine=_machine(result["machine"]),
            fits_memory=False,
            fits_time=False,
            peak_gib=float(row["peak GPU memory GiB"]),
            step_ms=float(row["ms/step"]) if alone else None,
        )


def _layers(path: Path, config_from: Path) -> Iterator[Measured]:
    """The rows of moe_layer.json, time only: one layer's experts, with even routing. Those of the
    stock GEMMs were launched one by one there, which is not planned."""
    result, tree = _read(path), _read(config_from)["config"]
    for row in result["rows"]:
        if "error" in row or row["gpus"] != 1:
            continue
        tree["model"] |= {"num_layers": 1, "hidden_size": row["hidden"]}
        tree["model"]["seq_len"] = row["tokens_per_gpu"]
        tree["moe"] |= {"num_experts": row["experts"], "top_k": row["top_k"]}
        tree["moe"] |= {"ffn_hidden_size": row["ffn"], "capacity": None}
        one = {"path": row["path"], "micro_batch": 1, "gpus": 1}
        shape = _shape(tree, one, "balanced", ())
        if shape is None or shape.linear == "stock":
            continue
        yield Measured(
            name=f"one layer of {row['shape']} `{row['path']}`, 1 GPU",
            source=path.name,
            shape=replace(shape, full=True),
            machine=_machine(result["machine"]),
            fits_memory=False,
            fits_time=row["shape"] == WAITED,
            peak_gib=None,
            step_ms=row["forward_ms"]["median"] + row["backward_ms"]["median"],
            is_layer=True,
        )


def _pairs(path: Path, config_from: Path) -> Iterator[Measured]:
    """The rows of pairs.json, which say how they differ from the benchmark's config on one GPU."""
    result, tree = _read(path), _read(config_from)["config"]
    seen = set()
    for row in result["rows"]:
        for i, path_name in enumerate(row["pair"]):
            if ":" in path_name or (row["hidden"], path_name) in seen:
                continue
            seen.add((row["hidden"], path_name))
            tree["model"] |= {"num_layers": row["layers"], "hidden_size": row["hidden"]}
            tree["moe"] |= {"num_experts": row["experts"], "top_k": row["top_k"]}
            tree["moe"]["ffn_hidden_size"] = row["ffn"]
            gpus = row["gpus"]
            batch = row["tokens_per_gpu"] // tree["model"]["seq_len"]
            one = {"path": path_name, "micro_batch": batch, "gpus": gpus}
            shape = _shape(tree, one, "balanced", ())
            assert shape is not None
            name = f"pairs `{path_name}`, hidden {row['hidden']}, {row['layers']} layer(s), 1 GPU"
            peaks = row.get("peak_allocated_gib")
            yield Measured(
                name=name,
                source=path.name,
                shape=shape,
                machine=_machine(result["machine"]),
                fits_memory=False,
                fits_time=False,
                peak_gib=None if peaks is None else peaks[i],
                step_ms=row["step_ms"][i],
            )


def _machine(said: Any) -> Machine:
    name = said["device_name"] if isinstance(said, dict) else str(said)
    return MACHINES["h100" if "H100" in name else "h200"]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
