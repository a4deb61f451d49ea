"""Which keys of a config may change when a run goes on, and one line where another one did."""

import json
import os
from pathlib import Path

from train.checkpoint import checksums
from train.checkpoint.files import finished, newest
from train.config import Config, ConfigError, load, world_size_from_env

FREE = {
    *("run", "parallel", "checkpoint", "tracking"),
    *("moe.path", "moe.dispatch", "moe.dispatch_sms", "moe.recompute"),
    *("train.steps", "train.micro_batch", "train.global_batch", "train.device"),
    *("train.deterministic", "train.on_nonfinite"),
    *("train.log_every", "train.valid_every", "train.valid_batches", "train.warmup_steps"),
    *("train.profile", "train.profile_every", "train.trace_step"),
    *("optim.prepare_weights", "data.workers"),
}
"""Sections and keys that may change when a run goes on. What `train.micro_batch` and
`train.global_batch` come to, together with the number of ranks, may not."""


def check_same_run(run_dir: Path, config: Config) -> None:
    """Raise ConfigError if the newest readable checkpoint is of another model or training."""
    for path in reversed(finished(run_dir / "checkpoints")):
        try:
            before = load(path / "config.yaml")
            about = json.loads((path / "training.json").read_text())
            break
        except (ConfigError, OSError, ValueError):
            continue  # a damaged one, which is skipped later, with a line that says so
    else:
        return
    there, now = (one.model_dump(mode="json") for one in (before, config))
    differ = [
        f"{section}.{key}: {there[section].get(key)} there, {value} now"
        for section, keys in now.items()
        for key, value in keys.items()
        if not FREE & {section, f"{section}.{key}"} and there[section].get(key) != value
    ]
    batch = config.global_batch(world_size_from_env())
    if batch != about["global_batch"]:
        differ.append(f"train.global_batch: {about['global_batch']} there, {batch} now")
    if differ:
        raise ConfigError(
            f"{run_dir} holds another run ({'; '.join(differ)}); choose another run.name, or these "
            "keys as they were to continue it"
        )


def already_trained(config: Config) -> bool:
    """Whether the run has its last step behind it; rank 0 then says so."""
    found = newest(config.run_dir / "checkpoints")
    if found is None or found[0] < config.train.steps:
        return False
    # A damaged last checkpoint is found out when it is restored, and its steps are trained again.
    if checksums.damage(found[1]):
        return False
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{config.run_dir} has already trained {found[0]} steps; raise train.steps="
            f"{config.train.steps} to go on, or choose another run.name"
        )
    return True
