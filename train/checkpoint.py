"""Checkpoints with torch.distributed.checkpoint: sharded, and readable by any number of ranks.

    runs/<name>/checkpoints/step_00000200/

A checkpoint is written beside its final name and renamed when it is whole, so a folder with that
name is complete.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from models.gpt import GPT
from train.config import Config, ConfigError, load

_NAME = re.compile(r"step_(\d{8})")


class _Training(Stateful):
    """Model and optimizer as one state, under parameter names instead of numbers."""

    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self.options,
        )


def save(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, step: int, keep: int) -> None:
    """Save the training after `step` optimizer steps and drop all but the newest `keep`."""
    final = folder / f"step_{step:08d}"
    unfinished = folder / f"{final.name}.unfinished"
    if dist.get_rank() == 0 and unfinished.exists():
        shutil.rmtree(unfinished)
    dist.barrier()
    dcp.save({"training": _Training(model, optimizer)}, checkpoint_id=unfinished)
    dist.barrier()
    if dist.get_rank() == 0:
        unfinished.rename(final)
        for old in _finished(folder)[:-keep]:
            shutil.rmtree(old)


def newest(folder: Path) -> tuple[int, Path] | None:
    """The step and folder of the newest complete checkpoint."""
    finished = _finished(folder)
    return (int(finished[-1].name.removeprefix("step_")), finished[-1]) if finished else None


def restore(path: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint in place, cut for the ranks that are here now."""
    dcp.load({"training": _Training(model, optimizer)}, checkpoint_id=path)


FREE = {
    *("run", "parallel", "checkpoint", "tracking"),
    *("moe.path", "moe.dispatch", "moe.dispatch_sms"),
    *("train.steps", "train.micro_batch", "train.device", "train.deterministic"),
    *("train.log_every", "train.valid_every", "train.valid_batches", "train.warmup_steps"),
    *("train.profile", "train.profile_every", "train.trace_step"),
    "data.workers",
}
"""Sections and keys that may change when a run goes on."""


def check_same_run(run_dir: Path, config: Config) -> None:
    """Raise ConfigError if the checkpoints in this folder are of another model or training."""
    if newest(run_dir / "checkpoints") is None:
        return
    there, now = (one.model_dump(mode="json") for one in (load(run_dir / "config.yaml"), config))
    differ = [
        f"{section}.{key}: {there[section][key]} there, {value} now"
        for section, keys in now.items()
        for key, value in keys.items()
        if not FREE & {section, f"{section}.{key}"} and there[section][key] != value
    ]
    if differ:
        raise ConfigError(
            f"{run_dir} holds another run ({'; '.join(differ)}); choose another run.name, or these "
            "keys as they were to continue it"
        )


def _finished(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
