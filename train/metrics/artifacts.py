"""Checkpoints as model artifacts of W&B, `tracking.artifacts`, uploaded in the background.

A checkpoint is whole as soon as it has its name. Then its files get a second name each, a hard link
in the run's `wandb/artifacts/`, so that they can be hashed and uploaded in a thread of their own
while the checkpoint is rotated away; no byte is copied. Offline the links stay until the run's
`wandb/` is deleted, since `scripts/sync.sh` uploads what they name.

Whatever fails, training continues, and one line says that no further checkpoint is logged.
"""

import logging
import os
import queue
import shutil
import threading
from pathlib import Path

from train.checkpoint.files import finished, folder_of, step_of
from train.config import Config
from train.metrics import tracking
from train.metrics.tensorboard import TensorBoard
from train.metrics.tracking import Tracker

log = logging.getLogger(__name__)

LOGGED = "steps"
"""A file in `wandb/artifacts/`: the steps that were logged, one a line."""


class Artifacts:
    """The uploads of one run. Only rank 0 has it; no method raises."""

    def __init__(
        self, config: Config, run_dir: Path, tracker: Tracker | TensorBoard, first_step: int
    ) -> None:
        """For checkpoints from `first_step` on."""
        self._wanted, self._first = config.tracking.artifacts, first_step
        self._checkpoints = folder_of(run_dir)
        self._folder = run_dir / "wandb" / "artifacts"
        self._tracker = tracker
        self._begun: set[int] = set()
        self._waiting: queue.Queue[tuple[Path, int] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        if not isinstance(tracker, Tracker) or tracker.mode == "disabled":
            self._wanted = "none"

    def look(self) -> None:
        """Log, in the background, each checkpoint that has become whole, if all are wanted."""
        if self._wanted == "all":
            for path in finished(self._checkpoints):
                self._log(path)

    def finish(self) -> None:
        """Log what is left at the end of the run, and wait for the upload."""
        self.look()
        if self._wanted == "last":
            for path in finished(self._checkpoints)[-1:]:
                self._log(path)
        if self._thread is None:
            return
        self._waiting.put(None)
        self._thread.join(tracking.ARTIFACT_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning(
                "checkpoints are not uploaded after %d s; they stay in %s",
                *(tracking.ARTIFACT_TIMEOUT_S, self._checkpoints),
            )

    def _log(self, path: Path) -> None:
        step = step_of(path)
        if step < self._first or step in self._begun:
            return
        self._begun.add(step)
        try:
            if step in self._logged():
                return
            self._waiting.put((self._linked(path), step))
        except OSError as error:
            self._give_up(error)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="artifacts", daemon=True)
            self._thread.start()

    def _linked(self, path: Path) -> Path:
        """A folder of our own with the checkpoint's files; its own where links cannot be made."""
        folder = self._folder / path.name
        shutil.rmtree(folder, ignore_errors=True)  # half of one that a kill left
        folder.mkdir(parents=True)
        try:
            for file in path.iterdir():
                os.link(file, folder / file.name)
        except PermissionError:  # a file system without hard links
            shutil.rmtree(folder, ignore_errors=True)
            return path
        return folder

    def _logged(self) -> set[int]:
        path = self._folder / LOGGED
        return {int(line) for line in path.read_text().split()} if path.is_file() else set()

    def _work(self) -> None:
        assert isinstance(self._tracker, Tracker)
        while (next_one := self._waiting.get()) is not None:
            folder, step = next_one
            if self._wanted == "none":
                continue
            try:
                self._tracker.checkpoint(folder, step)
                with (self._folder / LOGGED).open("a") as file:
                    file.write(f"{step}\n")
                if self._tracker.mode == "online" and folder.parent == self._folder:
                    shutil.rmtree(folder, ignore_errors=True)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._wanted = "none"
        log.warning(
            "a checkpoint is not logged to W&B, nor any further one; training continues (%s: %s)",
            *(type(error).__name__, " ".join(str(error).split())[:200]),
        )
