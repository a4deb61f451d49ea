"""`metrics.jsonl` and its like: what a run logs, on disk."""

import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from train.checkpoint.changed import Changed

log = logging.getLogger(__name__)

LoadRow = TypedDict("LoadRow", {"progress/step": int, "moe/expert_load": list[list[float]]})
"""A line of `routing.jsonl`: a list of experts for each layer, tokens over the layer's mean."""

ChangeRow = TypedDict("ChangeRow", {"progress/step": int, "changed": Changed})
"""A line of `changes.jsonl`: the first step that trained with it."""


class MetricsFile:
    """`metrics.jsonl`: one JSON object per logged step, on disk as soon as it is written.

    A loss that is not finite becomes `null`, since JSON has neither NaN nor infinity; a reader
    takes `null` for "not a number".
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Open for the steps after `resume_step`; 0 starts a new file.

        A run that was killed has logged steps after its last checkpoint, and perhaps half a line.
        They are dropped, because the resumed run logs them again.
        """
        if path.exists():
            _keep_until(path, resume_step)
        # Without a buffer, since Python's drops what it cannot write.
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._failing = False

    def write(self, metrics: Mapping[str, float] | LoadRow | ChangeRow) -> None:
        """Append one step's metrics. Raises KeyError without `progress/step`.

        Where the disk is full the line waits in memory for the next call, and the first says so.
        """
        metrics["progress/step"]
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        self._waiting += (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            self._open_again_if_gone()
            self._flush()
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning(
                    "%s cannot be written (%s); lines wait", self._file.name, error.strerror
                )
            self._failing = True

    def _open_again_if_gone(self) -> None:
        """Open the file again if the run's folder was deleted or moved: what is written into a file
        without a name is lost."""
        path = Path(self._file.name)
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(self._file.fileno())):
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.open("ab", buffering=0)
        self._file.close()
        self._file = new
        log.warning("%s was removed while it was written; it begins again with this step", path)

    def _flush(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        try:
            self._flush()
            self._file.close()
        except OSError as error:
            log.warning("the end of %s is lost (%s)", self._file.name, error.strerror)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, so that a crash in between leaves the old file or the new."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["progress/step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # half a line
    new = path.with_suffix(".tmp")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
