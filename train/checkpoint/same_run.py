"""Whether a run folder and a config belong to one run, and whether that run has steps left."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from models.config import FREE_ON_RESUME
from train.checkpoint import checksums, progress
from train.checkpoint.files import finished, folder_of, newest, size_of
from train.config import Config, ConfigError, is_free, is_same_training, world_size_from_env
from train.data import fingerprint as fingerprints

IN_FINGERPRINT = {
    f"data.{key}"
    for key in (
        *("path", "mixture", "name", "subset", "split"),
        *("text_column", "tokenizer", "eod_token"),
    )
}
"""Keys that only locate the data: a fingerprint of the data in the checkpoint is a better test."""


def check_same_run(run_dir: Path, config: Config) -> None:
    """Raise ConfigError if the newest whole checkpoint is of another model or training.

    It runs before anything starts, and reads large files only where a checkpoint is refused;
    `check_checkpoint` checks the one that is loaded again.
    """
    for path in reversed(finished(folder_of(run_dir))):
        if checksums.damage_of(path, checksums.CONFIG, checksums.ABOUT) is not None:
            continue  # skipped later, with a line that says so
        try:
            check_checkpoint(path, config, world_size_from_env(), data_comes_later=True)
        except ConfigError:
            if checksums.damage(path) is None:
                raise
            continue
        return


def check_checkpoint(
    path: Path,
    config: Config,
    world_size: int,
    fingerprint: Mapping[str, Any] | None = None,
    data_comes_later: bool = False,
) -> None:
    """Raise ConfigError if a checkpoint is of another model or training than `config` on this many
    ranks, or if that cannot be told. The data is compared by its `fingerprint`, which may come
    later, or else by the keys that name it.

    Keys marked FreeOnResume may differ, and so may values that SameTraining lists. The global batch
    that follows from `train.micro_batch`, `train.global_batch` and the number of ranks may not.
    """
    try:
        there = yaml.safe_load((path / checksums.CONFIG).read_text(encoding="utf-8"))
        about = json.loads((path / checksums.ABOUT).read_text(encoding="utf-8"))
        known = about.get("data") and (data_comes_later or fingerprint is not None)
        differ = _differences(there, config, covered=IN_FINGERPRINT if known else set())
        if known and fingerprint is not None:
            differ += fingerprints.differences(about["data"], fingerprint)
        unknown = _unknown_keys(there, config)
        batch = config.global_batch(world_size)
        if batch != about["global_batch"]:
            differ.append(f"train.global_batch: {about['global_batch']} there, {batch} now")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} does not say which run it is of ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); choose another run.name, or the version of this "
            "code that wrote it"
        ) from None
    if differ:
        raise ConfigError(
            f"{path.parent.parent} holds another run ({'; '.join(differ)}); choose another "
            "run.name, or these keys as they were to continue it"
        )
    if unknown:
        raise ConfigError(
            f"{path} has config keys that this version does not know ({'; '.join(unknown)}), so "
            "it may be another run; choose another run.name, or continue this one "
            "with the version of this code that wrote it"
        )


def _differences(there: dict[str, dict[str, Any]], config: Config, covered: set[str]) -> list[str]:
    """The keys in which a checkpoint's config differs; those that it lacks had their default."""
    found = []
    for section, keys in config.model_dump(mode="json").items():
        for key, value in keys.items():
            if is_free(section, key) or f"{section}.{key}" in covered:
                continue
            before = there.get(section, {}).get(key, _default(config, section, key))
            if before != value and not is_same_training(section, key, before, value):
                found.append(f"{section}.{key}: {before} there, {value} now")
    return found


def _default(config: Config, section: str, key: str) -> object:
    default = type(getattr(config, section)).model_fields[key].default
    return "nothing" if default is PydanticUndefined else default


def _unknown_keys(there: dict[str, dict[str, Any]], config: Config) -> list[str]:
    """Keys that another version of this code has, except for sections that are free as a whole."""
    known = config.model_dump(mode="json")
    return [
        f"{section}.{key}={value}"
        for section, keys in there.items()
        if section not in known or FREE_ON_RESUME not in Config.model_fields[section].metadata
        for key, value in keys.items()
        if key not in known.get(section, {})
    ]


def already_trained(config: Config) -> bool:
    """Whether the run has completed its last step; rank 0 then reports it."""
    found = newest(folder_of(config.run_dir))
    if found is None or found[0] < config.train.steps:
        return False
    step, path = found
    is_first = int(os.environ.get("RANK", "0")) == 0
    # A damaged last checkpoint is noticed when it is restored, and its steps are trained again.
    count = progress.Count()
    with progress.said(f"checking {path.name}", size_of(path), count.get, is_first):
        problem = checksums.damage(path, read_bytes=count.add)
    if problem is not None:
        return False
    if is_first:
        print(
            f"{config.run_dir} has already trained {step} steps; raise train.steps="
            f"{config.train.steps} to continue, or choose another run.name"
        )
    return True
