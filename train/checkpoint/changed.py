"""What a resumed run trains with that its checkpoint did not."""

from pathlib import Path

import yaml

from train.config import Config, is_said


def changed_keys(checkpoint: Path, config: Config) -> str:
    """The changed keys that the start reports, in one line; empty where none has changed."""
    there = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    return ", ".join(
        f"{section}.{key}={value} (was {before})"
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
        if is_said(section, key) and (before := there.get(section, {}).get(key, value)) != value
    )
