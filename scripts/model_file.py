"""One safetensors file with the whole model: its weights in float32, its config and its step.

    weights, config, step = read_checkpoint(Path("runs/demo/checkpoints/step_00000200"))
    write(Path("model.safetensors"), weights, config, step)
    model, tokenizer, config = load_model(Path("model.safetensors"), "cpu")

Names are those of `models.gpt.build_gpt` on one rank: experts are one tensor, [experts, ...].
"""

import json
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.gpt import GPT, build_gpt, why_not
from train import parallel
from train.checkpoint import checksums
from train.checkpoint.files import finished, step_of
from train.config import Config, ConfigError, load
from train.data.tokenizer import Tokenizer, load_tokenizer

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
        if name.startswith(PREFIX) and isinstance(meta, dcp.metadata.TensorStorageMetadata)
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


def load_model(
    path: Path, device: str, moe_path: str | None = None
) -> tuple[GPT, Tokenizer, Config]:
    """The model on `cpu` or `cuda`, ready to predict, in bfloat16 on a GPU; its tokenizer, config.

    Experts compute by `moe_path`, by default the one the model was trained on. Starts a process
    group of this process alone. Raises ConfigError.
    """
    weights, config, _ = read(path)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eod_token)
    # Every token is to be served, each by the experts that its router chooses.
    moe = config.moe.model_copy(
        update={
            "path": moe_path or config.moe.path,
            "capacity": None,
            "force_balance": False,
            "dispatch": "all_to_all",
        }
    )
    reason = why_not(config.model, moe, device, 1)
    if reason:
        raise ConfigError(reason)
    ranks = parallel.start(device, 1, config.train.seed, timeout_s=600)
    model = build_gpt(config.model, moe, ranks.device, config.train.seed)
    model.load_state_dict(weights, strict=False)
    missing = {name for name, _ in model.named_parameters()} - weights.keys()
    if missing:
        raise ConfigError(f"{path} lacks weights: {', '.join(sorted(missing))}")
    if device == "cuda":
        model.to(torch.bfloat16)
    return model.eval(), tokenizer, config
