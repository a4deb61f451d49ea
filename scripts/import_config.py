"""Write the config of a run that starts from the weights of a Hugging Face checkpoint.

    python -m scripts.import_config FOLDER --out configs/NAME.yaml

FOLDER is a Qwen3-MoE or Mixtral checkpoint, as downloaded from the hub. What it does not say, such
as the learning rate, gets a default to be changed.
"""

import argparse
import math
import os
import shlex
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
from train.whole_file import whole

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
    found = hf_reader.read_json(folder)
    longest = found.get("max_position_embeddings")
    sections["model"]["seq_len"] = min(longest, LONGEST) if isinstance(longest, int) else LONGEST
    sections["moe"]["aux_loss_coeff"] = found.get("router_aux_loss_coef", 0.001)
    sections["optim"] = {"lr": 1e-5, "warmup_steps": 100}
    sections["train"] = {"steps": 1000, "micro_batch": 1}
    if (folder / FILE).is_file():
        sections["data"] = {"tokenizer": str(folder)}
    return family.architecture, sections


def write(out: Path, folder: Path) -> Config:
    """Write the file, whole or not at all; what it says. Raises ConfigError."""
    if out.suffix != ".yaml":
        raise ConfigError(f"--out {out} must end in .yaml; name a file such as configs/mine.yaml")
    try:
        if os.path.lexists(out):
            raise ConfigError(f"--out {out} is there already; name another, or delete it")
        architecture, sections = config_of(folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as new:
            new.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
            try:
                config = load(new)
            except ConfigError as error:
                raise ConfigError(f"{folder} cannot be trained here: {error}") from None
            hf_reader.source(config)  # what is wrong with its weights is better known now
            head = about(config, f"The {architecture} in {folder}", out)
            new.write_text(head + new.read_text(encoding="utf-8"), encoding="utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"--out {out}: the name is not UTF-8; name another") from None
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    return config


def about(config: Config, what: str, out: Path) -> str:
    """The comment at the head of the file: how large the model is, and how to start."""
    total = flops.count(config.model, config.moe).total_params
    ranks = math.gcd(8, config.moe.num_experts)
    file = shlex.quote(str(out))
    command = f"torchrun --nproc-per-node {ranks} -m train {file} parallel.expert_parallel={ranks}"
    return (
        f"# {' '.join(what.split())}: {total / 1e9:,.2f} billion parameters.\n"
        f"#   {command}\n"
        f"# It needs {total * 16 / 1e9:,.1f} GB of all GPUs together before activations: weights,\n"
        "# gradients and AdamW's two means in float32.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, reported in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.import_config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a folder with config.json and .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="the .yaml file to write")
    options = parser.parse_args(arguments)
    try:
        write(options.out, options.folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: look at optim, train and data in it before you train")
    return 0


if __name__ == "__main__":
    terminal.run(main)
