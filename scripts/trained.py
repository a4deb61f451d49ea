"""A trained model from whatever holds one, on one device and ready to predict.

found = find(path)                 # a run's folder, a file of scripts.export, or a folder of
model = build(found, "cuda")       # Hugging Face's
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models.config import PATH_NAMES
from models.gpt import GPT, build_gpt
from models.hf import config as hf_config
from models.moe.runtime import why_not
from scripts import export
from scripts.import_config import config_of
from train import parallel
from train.checkpoint import hf_reader
from train.checkpoint.files import is_of_model
from train.config import Config, ConfigError, with_keys
from train.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Trained:
    """A model that was found; of Hugging Face's folder no weight is read yet."""

    path: Path
    config: Config
    weights: dict[str, Tensor] | None
    """float32 by name; None where they are in Hugging Face's layout in `path`."""
    step: int | None = None
    """None where it is not recorded."""
    tokenizer: Tokenizer | None = None
    """None where the file has none; the config says which it is."""

    def fitting_tokenizer(self) -> Tokenizer:
        """Its own, or the config's. Raises ConfigError where the model cannot have been trained
        with it."""
        data, vocab = self.config.data, self.config.model.vocab_size
        found = self.tokenizer or load_tokenizer(data.tokenizer, data.eod_token)
        if found.vocab_size > vocab:
            raise ConfigError(
                f"{self.path}: the tokenizer has {found.vocab_size} tokens and the model {vocab}; "
                f"data.tokenizer={data.tokenizer} is not what it was trained with"
            )
        return found

    def with_keys(self, keys: list[str]) -> "Trained":
        """The same with `section.key=value` overrides of its config. Raises ConfigError."""
        return replace(self, config=with_keys(self.config, keys)) if keys else self


def find(path: Path) -> Trained:
    """What a path holds: a run's folder or one of its checkpoints, a file that scripts.export has
    written, or a folder of Hugging Face's. Raises ConfigError."""
    if path.is_dir() and (path / hf_config.FILE).is_file():
        return of_hf(path)
    return of_run(path) if path.is_dir() else of_file(path)


def of_file(path: Path) -> Trained:
    """Raises ConfigError."""
    weights, config, step, tokenizer = export.read(path)
    return Trained(path, config, weights, step, tokenizer)


def of_run(path: Path) -> Trained:
    """The newest whole checkpoint of a run. Raises ConfigError."""
    folder = export.find_checkpoint(path, None)
    weights, config, step = export.read_checkpoint(folder)
    return Trained(folder, config, weights, step)


def of_hf(path: Path) -> Trained:
    """Raises ConfigError."""
    _, sections = config_of(path)
    sections["run"] = {"name": "hf"}
    try:
        config = Config.model_validate(sections)
    except ValueError as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be computed here: {text}") from None
    hf_reader.source(config)  # names, shapes and dtypes; no weight
    return Trained(path, config, None)


def build(found: Trained, device: str, moe_path: str | None = None) -> GPT:
    """The model on `cpu` or `cuda`, ready to predict, in bfloat16 on a GPU.

    Experts compute by `moe_path`, by default the one the model was trained on. Starts a process
    group of this process alone. Raises ConfigError.
    """
    config = found.config
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here; leave --device out")
    if moe_path is not None and moe_path not in PATH_NAMES:
        raise ConfigError(f"--path {moe_path}: no such path; known: {', '.join(PATH_NAMES)}")
    # No token is dropped, and each goes to the experts that the router chooses.
    moe = config.moe.model_copy(
        update={
            "path": moe_path or config.moe.path,
            "capacity": None,
            "force_balance": False,
            "dispatch": "all_to_all",
        }
    )
    shape = config.model.model_copy(update={"attention_backend": "auto"})  # of any machine
    if (reason := why_not(shape, moe, device, 1)) is not None:
        raise ConfigError(reason)
    ranks = parallel.start(device, 1, config.train.seed, timeout_s=600)
    try:
        model = build_gpt(shape, moe, ranks.device, config.train.seed)
        _fill(model, found)
    except ConfigError:
        parallel.stop()  # another one may be built
        raise
    if device == "cuda":
        for parameter in model.parameters():  # buffers stay what they are in training
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def _fill(model: GPT, found: Trained) -> None:
    """Give the model the weights that were found. Raises ConfigError where they do not fit."""
    path = found.path
    if found.weights is None:
        hf_reader.load(hf_reader.source(found.config), model, speaks=True)
        return
    try:
        model.load_state_dict(found.weights, strict=False)
    except RuntimeError as error:  # shapes
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} does not fit its own config: {reason}") from None
    missing = {key for key in model.state_dict() if is_of_model(key)} - found.weights.keys()
    if missing:
        raise ConfigError(f"{path} lacks weights: {', '.join(sorted(missing))}")
