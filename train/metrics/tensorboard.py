"""TensorBoard instead of W&B, `tracking.backend=tensorboard`: the same names in event files.

    tensorboard --logdir runs

Whatever its library or the disk does, training continues: the first failure prints one line, and
from then on `metrics.jsonl` is the only record.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from train.config import Config

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from train.metrics.environment import Environment

log = logging.getLogger(__name__)

FOLDER = "tensorboard"
"""Name of the folder in the run's folder."""

FLUSH_S = 10
"""Seconds after which what was logged is on disk."""


def why_not() -> str | None:
    """Why there is no TensorBoard here, in one line; None if there is."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except Exception as error:  # a package beside another version of protobuf fails in its own ways
        missing = isinstance(error, ModuleNotFoundError)
        state = "is missing" if missing else f"does not load ({' '.join(str(error).split())})"
        return f"the package tensorboard {state}; pip install tensorboard"
    return None


class TensorBoard:
    """The event files of one run, a new one each start. Only rank 0 has it; no method raises."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        environment: "Environment | None" = None,
        first_step: int = 0,
    ) -> None:
        """Write for the steps after `first_step`. Lines of these steps that a killed run has left
        are hidden, since they are logged again."""
        self.folder = run_dir / FOLDER
        self._writer: SummaryWriter | None = None
        self._step = first_step
        about = {**config.model_dump(mode="json"), "environment": dict(environment or {})}
        lines = yaml.safe_dump(about, sort_keys=False).splitlines()

        def start() -> None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(self.folder), purge_step=first_step + 1, flush_secs=FLUSH_S
            )
            as_code = "\n".join(f"    {line}" for line in lines)  # in Markdown
            self._writer.add_text("config", as_code, first_step)

        self._try(start)

    def describe(self) -> str:
        """One line for the user: where the run can be seen."""
        if self._writer is None:
            return "TensorBoard: off"
        return f"TensorBoard: tensorboard --logdir {self.folder.parent.parent}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one step's metrics under their names."""
        self._step = step
        if (writer := self._writer) is None:
            return

        def scalars() -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        self._try(scalars)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG with a step's metrics."""
        if (writer := self._writer) is None:
            return

        def image() -> None:
            from matplotlib.image import imread

            writer.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

        self._try(image)

    def summary(self, values: Mapping[str, float]) -> None:
        """Figures of the whole run, such as medians, at the last step that was logged."""
        self.log(values, self._step)

    def finish(self, exit_code: int = 0) -> None:
        """Have all of it on disk. A second call does nothing."""
        if self._writer is not None:
            self._try(self._writer.close)
        self._writer = None

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._writer = None
            text = " ".join(str(error).split())[:200]
            log.warning(
                "TensorBoard failed; training continues without it (%s: %s)",
                *(type(error).__name__, text),
            )
