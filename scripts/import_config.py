"""Write the config of a training that begins with the weights of a Hugging Face checkpoint.

    python -m scripts.import_config FOLDER --out configs/NAME.yaml

FOLDER is a Qwen3-MoE or Mixtral checkpoint, as downloaded from the hub. What it does not say, such
as the learning rate, is there to be changed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scripts import terminal
from train.checkpoint import hf_reader
from train.config import Config, ConfigError, load
from train.data.tokenizer import FILE
from train.metrics import flops

LONGEST = 4096
"""Tokens of a sequence, where the checkpoint can take more."""


def config_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """The class that a folder holds, and a config file's sections. Raises ConfigError."""
    family, keys = hf_reader.read_config(folder)
    sections: dict[str, Any] = {"model": {"init_from": str(folder)}, "moe": {"path": "bf16"}}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if value is not None:
            sections[section][name] = value
    about = hf_reader.read_json(folder)
    longest = about.get("max_position_embeddings") or LONGEST
    sections["model"]["seq_len"] = min(longest, LONGEST)
    sections["moe"]["aux_loss_coeff"] = float(about.get("router_aux_loss_coef", 0.001))
    sections["optim"] = {"lr": 1e-5, "warmup_steps": 100}
    sections["train"] = {"steps": 1000, "micro_batch": 1}
    if (folder / FILE).is_file():
        sections["data"] = {"tokenizer": str(folder)}
    return family.architecture, sections


def write(out: Path, folder: Path) -> Config:
    """Write the file, whole or not at all; what it says. Raises ConfigError."""
    if out.suffix != ".yaml":
        raise ConfigError(f"--out {out} must end in .yaml; name a file such as configs/mine.yaml")
    if out.exists():
        raise ConfigError(f"--out {out} is there already; name another, or delete it")
    architecture, sections = config_of(folder)
    new = out.with_name(f"{out.name}.unfinished")
    try:
        new.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
        try:
            config = load(new)
        except ConfigError as error:
            raise ConfigError(f"{folder} cannot be trained here: {error}") from None
        total = flops.count(config.model, config.moe).total_params
        about = (
            f"# The {architecture} in {folder}: {total / 1e9:,.2f} billion parameters,\n"
            f"# which take {total * 16 / 1e9:,.1f} GB of all GPUs together before activations:\n"
            "# weights, gradients and AdamW's two means in float32.\n"
            f"#   torchrun --nproc-per-node 8 -m train {out} parallel.expert_parallel=8\n"
        )
        new.write_text(about + new.read_text(encoding="utf-8"), encoding="utf-8")
        new.replace(out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    finally:
        new.unlink(missing_ok=True)
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, said in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.import_config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="with config.json and .safetensors files")
    parser.add_argument("--out", type=Path, required=True, help="the .yaml file to write")
    options = parser.parse_args(arguments)
    try:
        config = write(options.out, options.folder)
        hf_reader.source(config)  # what is wrong with its weights is better known now
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: look at optim, train and data in it before you train")
    return 0


if __name__ == "__main__":
    terminal.run(main)
