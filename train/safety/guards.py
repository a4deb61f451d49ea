"""What keeps a training from losing anything, side by side for the loop."""

from pathlib import Path
from typing import Any, NoReturn

from models.gpt import GPT
from train.checkpoint.checkpointer import Checkpointer
from train.config import Config
from train.failure import Preempted
from train.parallel import Ranks
from train.safety.nonfinite import LossGuard
from train.safety.signals import StopRequest
from train.safety.watchdog import MARGIN_S, Watchdog


class Safety:
    """Open while there are steps: signals ask to stop, and a step that hangs is noticed."""

    def __init__(
        self, run_dir: Path, config: Config, ranks: Ranks, model: GPT, checkpointer: Checkpointer
    ) -> None:
        self.checkpointer = checkpointer
        self.config, self.ranks = config, ranks
        self.loss = LossGuard(config, ranks)
        timeout_s = config.parallel.timeout_s
        self.stop = StopRequest(ranks, timeout_s + MARGIN_S)
        self.watchdog = Watchdog(run_dir, ranks.rank, ranks.world_size, timeout_s)
        # In training and in validation; neither has a forward pass as long as the time-out.
        model.register_forward_pre_hook(lambda *_: self.watchdog.beat())

    def __enter__(self) -> "Safety":
        self.stop.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.watchdog.close()
        self.stop.__exit__(*error)

    def leave(self, step: int, reason: str, metrics: dict[str, Any]) -> NoReturn:
        """Have step `step` on disk, with `metrics` as in Checkpointer.save, and raise Preempted."""
        self.checkpointer.finish(step, metrics)
        if self.stop.file is not None:
            self.stop.file.write_text("saved\n")
        raise Preempted(
            f"stopped by {reason} after step {step} of "
            f"{self.config.train.steps}, which is saved; the same command goes on from there"
        )
