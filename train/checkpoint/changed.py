"""What a resumed run trains with that its checkpoint did not."""

from pathlib import Path
from typing import Any

import yaml

from train.config import Config, is_said

Changed = dict[str, tuple[Any, Any]]
"""By key, such as `optim.lr`: its value before, and from now on."""


def changed_keys(checkpoint: Path, config: Config) -> Changed:
    """The keys with another value, of those whose change the start reports."""
    there = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    return {
        f"{section}.{key}": (before, value)
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
        if is_said(section, key) and (before := there.get(section, {}).get(key, value)) != value
    }
