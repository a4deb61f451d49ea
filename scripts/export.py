"""The whole model of a run in one safetensors file: weights in float32, config, tokenizer, step.

    python -m scripts.export runs/NAME --out model.safetensors [--step 200]
    python -m scripts.export runs/NAME --out FOLDER --format hf [--dtype bfloat16]

For any number of ranks that trained it; needs memory for the weights, and no GPU. Names are those
of `models.gpt.build_gpt` on one rank: experts are one tensor, [experts, ...]. With `--format hf` it
is a folder that Hugging Face's transformers loads, as Qwen3-MoE or Mixtral.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.hf import config as hf_config
from scripts import terminal
from train.checkpoint import checksums, hf_writer, progress
from train.checkpoint.files import finished, folder_of, is_of_model, size_of, step_of
from train.config import Config, ConfigError, load, with_keys
from train.data import hf_tokenizer
from train.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer
from train.whole_file import check_out, whole

PREFIX = "training.model."
"""Prefix of the names of the model's weights in a checkpoint."""


class Model(NamedTuple):
    """What the file holds."""

    weights: dict[str, Tensor]
    config: Config
    step: int
    tokenizer: Tokenizer | None
    """None in a file that has none."""


def find_checkpoint(path: Path, step: int | None) -> Path:
    """The whole checkpoint that a run's folder and a step mean, without a step the newest; or
    `path` itself if it is one. Raises ConfigError."""
    if (path / checksums.NAME).is_file():
        if step is not None and step != _about(path)["step"]:
            raise ConfigError(
                f"--step {step}: {path} is the checkpoint of step {_about(path)['step']}; leave "
                "--step out, or name the run's folder"
            )
        if (damage := _damage(path)) is not None:
            raise ConfigError(f"damaged checkpoint {path}: {damage}")
        return path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; name a run's folder or a checkpoint's")
    there = finished(folder_of(path))
    for one in reversed(there if step is None else [p for p in there if step_of(p) == step]):
        damage = _damage(one)
        if damage is None:
            return one
        after = "the one before it is tried" if step is None else "it is the only one of its step"
        print(f"damaged checkpoint {one}: {damage}; {after}", file=sys.stderr)
    which = "checkpoint" if step is None else f"checkpoint of step {step}"
    steps = ", ".join(str(step_of(one)) for one in there) or "none"
    raise ConfigError(f"{path} has no whole {which}; it has steps: {steps}")


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], Config, int]:
    """Weights, config and step of a whole checkpoint, whatever number of ranks wrote it.

    The config says the global batch, which may have followed from the number of ranks. Raises
    ConfigError where it is of a version that this one cannot read.
    """
    config, about = load(folder / checksums.CONFIG), _about(folder)
    if batch := about.get("global_batch"):  # not there in older ones
        config = with_keys(config, [f"train.global_batch={batch}"])
    reader = dcp.FileSystemReader(folder)
    try:
        state = {
            name: torch.empty(meta.size, dtype=meta.properties.dtype)
            for name, meta in reader.read_metadata().state_dict_metadata.items()
            if name.startswith(PREFIX)
            and is_of_model(name)
            and isinstance(meta, dcp.metadata.TensorStorageMetadata)
        }
        size = sum(t.numel() * t.element_size() for t in state.values())
        with warnings.catch_warnings(), progress.said("reading the weights", size):
            warnings.simplefilter("ignore")  # that there is no process group, which is intended
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # of many kinds: it unpickles
        raise ConfigError(
            f"{folder} cannot be read by this version of PyTorch and of this code: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from None
    weights = {name.removeprefix(PREFIX): value for name, value in state.items()}
    return weights, config, about["step"]


def write(
    path: Path,
    weights: dict[str, Tensor],
    config: Config,
    step: int,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write the file; whole, or not at all. Raises ConfigError."""
    check_out(path)
    metadata = {"config": config.model_dump_json(), "step": str(step), "format": "pt"}
    if tokenizer is not None:
        metadata["tokenizer"] = json.dumps(_made_of(tokenizer))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as new:
            save_file(weights, new, metadata)
            hf_writer.readable(new)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None


def read(path: Path) -> Model:
    """What `write` was given. Raises ConfigError."""
    if (path / "config.json").is_file():
        raise ConfigError(
            f"{path} has Hugging Face's layout, which is not read here; complete prompts with its "
            "transformers, as docs/models.md shows, or name a file of scripts.export"
        )
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder; write its model to a file first: "
            f"python -m scripts.export {path} --out model.safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if "config" not in metadata:
        raise ConfigError(f"{path} was not written by scripts.export: it holds no config")
    try:
        config = Config.model_validate_json(metadata["config"])
        made_of = json.loads(metadata.get("tokenizer", "null"))
        tokenizer = None if made_of is None else _made_from(made_of)
        return Model(weights, config, int(metadata["step"]), tokenizer)
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
        raise ConfigError(
            f"{path} holds a config that this version does not know ({keys}); use the version of "
            "this code that wrote it"
        ) from None
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ConfigError(
            f"{path} holds a tokenizer or step that cannot be read: {' '.join(str(error).split())}"
        ) from None


def check_fits_hf(config: Config) -> None:
    """Raise ConfigError, before any weight is read, where no class of transformers fits."""
    if (reason := hf_config.why_not(config.model, config.moe)) is not None:
        raise ConfigError(f"--format hf: {reason}")


def write_hf(
    out: Path, weights: dict[str, Tensor], config: Config, dtype: str, tokenizer: Tokenizer | None
) -> None:
    """Write a folder that transformers loads; whole, or not at all. Raises ConfigError."""
    model = config.model
    others, eod = {}, None
    if tokenizer is not None:
        eod = tokenizer.eod
        others = hf_tokenizer.files_of(tokenizer, model.seq_len)
        generation = hf_tokenizer.generation_config(tokenizer, model.vocab_size)
        others["generation_config.json"] = json.dumps(generation) + "\n"
    hf_writer.write(out, weights, config, getattr(torch, dtype), eod, others)


def _made_of(tokenizer: Tokenizer) -> list[str]:
    """Texts that make the tokenizer again, so that the file needs no other; none for bytes."""
    return [*tokenizer.__reduce__()[1]] if isinstance(tokenizer, FileTokenizer) else []


def _made_from(texts: list[str]) -> Tokenizer:
    return FileTokenizer(*texts) if texts else ByteTokenizer()


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; says how far it is where that takes long."""
    count = progress.Count()
    with progress.said(f"checking {folder.name}", size_of(folder), count.get):
        return checksums.damage(folder, read_bytes=count.add)


def _about(folder: Path) -> dict[str, int]:
    try:
        return json.loads((folder / checksums.ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"damaged checkpoint {folder}: {checksums.ABOUT}: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, reported in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the file or folder to write")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--format", choices=("native", "hf"), default="native", help="one file, or a folder"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights, for --format hf (float32)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.format == "hf":
            hf_writer.check_out(options.out)
        elif options.dtype is not None:
            raise ConfigError(
                f"--dtype {options.dtype}: a native file is in float32; add --format hf, or leave "
                "--dtype out"
            )
        else:
            check_out(options.out)
        folder = find_checkpoint(options.run, options.step)
        if options.format == "hf":
            check_fits_hf(load(folder / checksums.CONFIG))
        weights, config, step = read_checkpoint(folder)
        try:
            tokenizer = load_tokenizer(config.data.tokenizer, config.data.eod_token)
        except ConfigError as error:
            print(f"warning: {options.out} will hold no tokenizer: {error}", file=sys.stderr)
            tokenizer = None
        if options.format == "hf":
            write_hf(options.out, weights, config, options.dtype or "float32", tokenizer)
        else:
            write(options.out, weights, config, step, tokenizer)
    except (ConfigError, OSError) as error:  # the latter of a folder of somebody else
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(value.numel() for value in weights.values())
    print(f"{options.out}: {count:,} weights of {config.run.name} after step {step}, from {folder}")
    return 0


if __name__ == "__main__":
    terminal.run(main)
