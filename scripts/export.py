"""The whole model of a run in one safetensors file: its weights in float32, its config, its step.

    python -m scripts.export runs/NAME --out model.safetensors [--step 200]

Whatever number of ranks trained it; needs memory for the weights, and no GPU. Names are those of
`models.gpt.build_gpt` on one rank: experts are one tensor, [experts, ...].
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.checkpoint import checksums
from train.checkpoint.files import finished, is_of_model, step_of
from train.config import Config, ConfigError, load

PREFIX = "training.model."
"""Of the model's weights in a checkpoint, beside the optimizer's."""


def find_checkpoint(path: Path, step: int | None) -> Path:
    """The checkpoint that a run's folder and a step mean, the newest whole one without a step; or
    `path` itself if it is one. Raises ConfigError."""
    if (path / checksums.NAME).is_file():
        return path
    found = finished(path / "checkpoints")
    if step is not None:
        found = [one for one in found if step_of(one) == step]
    for one in reversed(found):
        damage = checksums.damage(one)
        if damage is None:
            return one
        print(f"damaged checkpoint {one}: {damage}; the one before it is tried")
    which = "checkpoint" if step is None else f"checkpoint of step {step}"
    there = ", ".join(str(step_of(one)) for one in finished(path / "checkpoints")) or "none"
    raise ConfigError(f"{path} has no whole {which}; it has steps: {there}")


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], Config, int]:
    """Weights, config and step of a checkpoint, whatever number of ranks wrote it.

    Raises ConfigError where it is damaged.
    """
    damage = checksums.damage(folder)
    if damage is not None:
        raise ConfigError(f"damaged checkpoint {folder}: {damage}")
    reader = dcp.FileSystemReader(folder)
    state = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(PREFIX)
        and is_of_model(name)
        and isinstance(meta, dcp.metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group, which is meant
        dcp.load(state, storage_reader=reader, no_dist=True)
    about = json.loads((folder / "training.json").read_text())
    weights = {name.removeprefix(PREFIX): value for name, value in state.items()}
    return weights, load(folder / "config.yaml"), about["step"]


def write(path: Path, weights: dict[str, Tensor], config: Config, step: int) -> None:
    """Write the file; whole, or not at all. Raises ConfigError."""
    new = path.with_name(f"{path.name}.unfinished")
    metadata = {"config": config.model_dump_json(), "step": str(step), "format": "pt"}
    try:
        save_file(weights, new, metadata)
        new.replace(path)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error}") from None


def read(path: Path) -> tuple[dict[str, Tensor], Config, int]:
    """What `write` was given. Raises ConfigError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if "config" not in metadata:
        raise ConfigError(f"{path} was not written by scripts.export: it holds no config")
    return weights, Config.model_validate_json(metadata["config"]), int(metadata["step"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, said in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    options = parser.parse_args(arguments)
    try:
        folder = find_checkpoint(options.run, options.step)
        weights, config, step = read_checkpoint(folder)
        write(options.out, weights, config, step)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(value.numel() for value in weights.values())
    print(f"{options.out}: {count:,} weights of {config.run.name} after step {step}, from {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
