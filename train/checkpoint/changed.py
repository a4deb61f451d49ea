"""What a resumed run trains with that its checkpoint did not."""

from pathlib import Path

import yaml

from train.config import Config, is_said


def changed_keys(checkpoint: Path, config: Config) -> str:
    """The keys that may change and are said, in one line; nothing where all are as they were."""
    there = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    return ", ".join(
        f"{section}.{key}={value} (was {before})"
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
        if is_said(section, key) and (before := there.get(section, {}).get(key, value)) != value
    )
