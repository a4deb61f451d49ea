"""Reads the weights of a Hugging Face checkpoint onto the ranks, each of which takes what it holds.

A file is mapped into memory, its tensors are copied, and it is closed before the next. Which tensor
is which part of our weights is in `models/hf/weights.py`, what config.json says in `config.py`
beside it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.gpt import GPT
from models.hf import config as hf_config
from models.hf.weights import INDEX, Piece, pieces
from train.checkpoint import progress
from train.config import Config, ConfigError

CONFIG = hf_config.FILE
SINGLE = "model.safetensors"
"""The file's name where all weights are in one file, without an index."""

DTYPES = ("F32", "BF16", "F16")
"""Dtypes that weights may be stored in, by safetensors' names: float32 holds each exactly."""


class Source(NamedTuple):
    """The folder that weights are read from; it fits the config."""

    folder: Path
    files: dict[str, list[Piece]]
    """The tensors in each file."""


def source(config: Config) -> Source:
    """The folder `model.init_from`, once its config and the names, shapes and dtypes in it are
    checked; no weight is read. Raises ConfigError, in one line, where it does not fit the
    config."""
    assert config.model.init_from is not None
    folder = Path(config.model.init_from).expanduser()
    family, keys = read_config(folder, "model.init_from=")
    sections = {"model": config.model, "moe": config.moe}
    differ = []
    for key, value in keys.items():
        section, _, name = key.partition(".")
        here = getattr(sections[section], "head_size" if name == "head_dim" else name)
        if here != value:
            differ.append(f"{key}={here} (there {value})")
    if differ:
        raise ConfigError(
            f"model.init_from={folder} is another model: {', '.join(differ)}; "
            f"python -m scripts.import_config {folder} writes a config that fits"
        )
    there = _headers(folder)
    is_packed = any(name.endswith(".experts.gate_up_proj") for name in there)
    files: dict[str, list[Piece]] = {}
    wrong, wanted = [], set()
    for piece in pieces(config.model, config.moe, family, is_packed):
        wanted.add(piece.theirs)
        file, shape, dtype = there.get(piece.theirs, ("", (), ""))
        if not file:
            wrong.append(f"{piece.theirs} is missing")
        elif shape != piece.shape:
            wrong.append(f"{piece.theirs} is {list(shape)}, not {list(piece.shape)}")
        elif dtype not in DTYPES:
            wrong.append(f"{piece.theirs} is in {dtype}, not in {', '.join(DTYPES)}")
        files.setdefault(file, []).append(piece)
    if config.model.tie_embeddings:
        wanted.add("lm_head.weight")  # some files hold it anyway; it is the embedding
    wrong += [f"{name} is not known" for name in there if name not in wanted]
    if wrong:
        more = f"; and {len(wrong) - 3} more like it" if len(wrong) > 3 else ""
        raise ConfigError(
            f"model.init_from={folder} does not hold the weights that its {CONFIG} says: "
            f"{'; '.join(wrong[:3])}{more}; take a whole {family.architecture}"
        )
    return Source(folder, files)


def read_config(folder: Path, key: str = "") -> tuple[hf_config.Family, dict[str, Any]]:
    """The class of a folder's config.json, and what it says as our keys.

    Raises ConfigError, which begins with `key` and the folder.
    """
    found = read_json(folder, key)
    try:
        return hf_config.from_theirs(found)
    except (ValueError, TypeError) as error:  # the latter for a value of another type
        raise ConfigError(f"{key}{folder}: {CONFIG} {error}") from None


def read_json(folder: Path, key: str = "") -> dict[str, Any]:
    """A folder's config.json, unchanged. Raises ConfigError."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{key}{folder}: {CONFIG}: {error.strerror}; name a folder with a Qwen3-MoE or Mixtral "
            "checkpoint, as downloaded from the hub"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{key}{folder}: {CONFIG} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{key}{folder}: {CONFIG} holds no keys; take a whole checkpoint")
    return found


def _headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """File, shape and dtype of every tensor in the folder."""
    found = {}
    for file in _files(folder):
        with _opened(folder, file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                there = tensors.get_slice(name)
                found[name] = (file, tuple(there.get_shape()), there.get_dtype())
    return found


def _files(folder: Path) -> list[str]:
    try:
        if not (folder / INDEX).is_file() and (folder / SINGLE).is_file():
            return [SINGLE]
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    except OSError:
        raise ConfigError(
            f"model.init_from={folder} has neither {INDEX} nor {SINGLE}; save_pretrained of the "
            "transformers library writes them"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"model.init_from={folder}: {INDEX} is not an index of weights: {error}"
        ) from None


def _opened(folder: Path, file: str) -> safe_open:
    try:
        return safe_open(folder / file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.init_from={folder}: {file} cannot be read: {error}") from None


@torch.no_grad()
def load(weights: Source, model: GPT, speaks: bool) -> None:
    """Copy the weights into a model that is not sharded yet: its experts are this rank's alone.

    Rank 0, which `speaks`, reports progress where it takes long.
    """
    parameters = dict(model.named_parameters())
    rank = parallel_state.get_expert_model_parallel_rank()
    size = sum((weights.folder / file).stat().st_size for file in weights.files)
    with progress.said(f"reading {weights.folder}", size, speaks=speaks):
        for file, held in weights.files.items():
            with _opened(weights.folder, file) as tensors:
                for piece in held:
                    _copy(tensors, piece, parameters[piece.ours], rank)


def _copy(tensors: safe_open, piece: Piece, weight: Tensor, rank: int) -> None:
    """Copy a tensor into `weight`, one of ours, as far as the rank holds it."""
    begin, end = rank * len(weight), (rank + 1) * len(weight)
    if not piece.of_experts:
        found = tensors.get_tensor(piece.theirs)
    elif piece.expert is None:
        found = tensors.get_slice(piece.theirs)[begin:end]
    elif begin <= piece.expert < end:
        found, weight = tensors.get_tensor(piece.theirs), weight[piece.expert - begin]
    else:
        return
    part = piece.part(weight)
    part.copy_(found.view(part.shape))
