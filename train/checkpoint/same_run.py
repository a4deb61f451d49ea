"""Whether a run folder and a config are of one run, and whether that run has steps left."""

import json
import os
from pathlib import Path

from train.checkpoint import checksums
from train.checkpoint.files import finished, newest
from train.config import Config, ConfigError, is_free, load, world_size_from_env


def check_same_run(run_dir: Path, config: Config) -> None:
    """Raise ConfigError if the newest readable checkpoint is of another model or training.

    Keys that are marked FreeOnResume may differ. What `train.micro_batch` and `train.global_batch`
    come to, together with the number of ranks, may not.
    """
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
        if not is_free(section, key) and there[section].get(key) != value
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
