"""Writes a model as a folder that Hugging Face's transformers loads: config.json and safetensors.

`models/hf/weights.py` says which part of our weights is which tensor there.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.hf import config as hf_config
from models.hf.weights import INDEX, Piece, pieces
from train import whole_file
from train.checkpoint import progress
from train.config import Config, ConfigError

SHARD_BYTES = 5_000_000_000
"""Most bytes of a file, unless one tensor has more."""


def check_out(out: Path) -> None:
    """Raise ConfigError where no folder of that name can be made."""
    if os.path.lexists(out) or not out.name:  # a link to nothing cannot become a folder
        raise ConfigError(f"--out {out} is there already; name a folder to make")
    whole_file.check_out(out)


def write(
    out: Path,
    weights: dict[str, Tensor],
    config: Config,
    dtype: torch.dtype,
    eod: int | None,
    others: dict[str, str],
) -> None:
    """Make a folder that transformers loads: whole, or not at all.

    weights: those of `models.gpt.build_gpt` on one rank. eod: the token that ends a document.
    others: texts of more files by name, as of a tokenizer. Raises ConfigError.
    """
    family = hf_config.family_of(config.model)
    # In the hub's layout, which all versions of transformers read.
    held = list(pieces(config.model, config.moe, family, packed=False))
    if unlike := weights.keys() ^ {piece.ours for piece in held}:
        raise ConfigError(
            f"{out} cannot be written as {family.architecture}: the checkpoint's weights are not "
            f"those of its config ({', '.join(sorted(unlike)[:3])}); use the version of this code "
            "that wrote it"
        )
    theirs = hf_config.to_theirs(config.model, config.moe, str(dtype).removeprefix("torch."), eod)
    new = whole_file.unfinished(out)
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        (new / hf_config.FILE).write_text(_json(theirs), encoding="utf-8")
        for name, text in others.items():
            (new / name).write_text(text, encoding="utf-8")
        _write_shards(new, weights, held, dtype)
        new.rename(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{out} cannot be written: {error}") from None
    finally:  # of an error or Ctrl-C
        shutil.rmtree(new, ignore_errors=True)


def _write_shards(
    folder: Path, weights: dict[str, Tensor], held: list[Piece], dtype: torch.dtype
) -> None:
    shards = list(_shards(held, dtype.itemsize))
    where = {}
    size = sum(_count(piece) for piece in held) * dtype.itemsize
    with progress.said(f"writing {folder}", size):
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for piece in shard:
                weight = weights[piece.ours]
                weight = weight if piece.expert is None else weight[piece.expert]
                part = piece.part(weight).reshape(piece.shape)
                tensors[piece.theirs] = part.to(dtype).contiguous()
                where[piece.theirs] = name
            save_file(tensors, folder / name, {"format": "pt"})
            readable(folder / name)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / INDEX).write_text(_json(index), encoding="utf-8")


def readable(path: Path) -> None:
    """Give a file the permissions of any other new one: safetensors gives access to its owner
    only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _shards(held: Iterable[Piece], itemsize: int) -> Iterator[list[Piece]]:
    """Groups of neighbours, as many as a file may hold."""
    shard: list[Piece] = []
    size = 0
    for piece in held:
        more = _count(piece) * itemsize
        if shard and size + more > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(piece)
        size += more
    yield shard


def _count(piece: Piece) -> int:
    return torch.Size(piece.shape).numel()


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
