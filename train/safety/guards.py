"""What watches over a run from outside its steps, together for the loop."""

from models.gpt import GPT
from train.config import Config
from train.parallel import Ranks
from train.safety.lifeline import Lifeline
from train.safety.signals import StopRequest
from train.safety.watchdog import MARGIN_S, Watchdog


class Safety:
    """Open during the steps: signals ask to stop, and a hanging step is noticed."""

    def __init__(self, config: Config, ranks: Ranks, model: GPT, lifeline: Lifeline) -> None:
        timeout_s = config.parallel.timeout_s
        self.stop = StopRequest(ranks, timeout_s + MARGIN_S)
        self.watchdog = Watchdog(
            config.run_dir, ranks.rank, ranks.world_size, timeout_s, lifeline.leave
        )
        # In training and in validation; neither has a forward pass as long as the time-out.
        model.register_forward_pre_hook(lambda *_: self.watchdog.beat())

    def __enter__(self) -> "Safety":
        self.stop.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.watchdog.close()
        self.stop.__exit__(*error)
