"""Where the time of a step goes: `train.profile`, and a trace of one step: `train.trace_step`.

Only chosen steps are profiled, on the first rank. All other steps run code without timers, and
events are read when the step's metrics are, so nothing waits for the GPU.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

from models.gpt import GPT
from train.config import TrainConfig
from train.profiling.model import PARTS as MODEL_PARTS
from train.profiling.model import replaced, timed_gpt
from train.profiling.timer import Lap, Timer

log = logging.getLogger(__name__)

PARTS = (*MODEL_PARTS, "weight_gather", "gradient_sync", "optimizer")
"""Parts that are logged as `time/<part>_ms`, in addition to `time/other_ms`."""

TRACE = "trace.json.gz"

PartMaker = Callable[[str], AbstractContextManager[None]]

FSDP_STATE = {"_root_post_backward_final_callback": "gradient_sync"}
FSDP_GROUP = {
    "unshard": "weight_gather",
    "wait_for_unshard": "weight_gather",
    "post_backward": "gradient_sync",
}
"""FSDP2's own functions, of a module's state and of its group of parameters (PyTorch 2.11 to 2.13).
Gathering and reducing run on streams of their own; what is timed is what the main stream does for
them and how long it waits."""


class StepProfiler:
    """Chooses the steps, and keeps what was measured in the last of them.

    With `train.profile`, one in `train.profile_every` logged steps is timed, the first one after
    `train.warmup_steps` included. A step in which a trace is recorded is not timed.
    """

    def __init__(
        self, model: GPT, train: TrainConfig, device: torch.device, run_dir: Path, first_rank: bool
    ) -> None:
        self._model = model
        self._train = train
        self._device = device
        self._run_dir = run_dir
        self._first_rank = first_rank
        self._warmup_left = train.warmup_steps
        self._logged = 0
        self._lap: Lap | None = None

    def traces(self, step: int) -> bool:
        """Whether a trace is recorded in this step, counted from 1. It takes longer than others."""
        return step == self._train.trace_step

    @contextmanager
    def step(self, step: int, is_logged: bool) -> Iterator[PartMaker]:
        """Around one step, counted from 1. What comes back times a part of it: `with part(name)`.

        In a step that is not profiled it does nothing.
        """
        times = self._chooses(is_logged)
        if self._first_rank and self.traces(step):
            with self._traced() as part:
                yield part
        elif times:
            timer = Timer(self._device)
            with timed_step(self._model, timer):
                timer.start()
                yield timer.part
                self._lap = timer.stop()
        else:
            yield untimed

    def metrics(self) -> dict[str, float]:
        """`time/<part>_ms` of the step timed since the last call, if there was one, and
        `time/profiled_step_ms`, which they add up to. Of this rank, in milliseconds."""
        if self._lap is None:
            return {}
        times = self._lap.milliseconds()
        self._lap = None
        metrics = {f"time/{part}_ms": times.get(part, 0.0) for part in (*PARTS, "other")}
        return {**metrics, "time/profiled_step_ms": times["total"]}

    def _chooses(self, is_logged: bool) -> bool:
        if self._warmup_left:
            self._warmup_left -= 1
            return False
        if not (self._first_rank and self._train.profile and is_logged):
            return False
        self._logged += 1
        return (self._logged - 1) % self._train.profile_every == 0

    @contextmanager
    def _traced(self) -> Iterator[PartMaker]:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)
        timer = Timer(self._device, named=True)
        with profile(activities=activities) as recorded:
            with timed_step(self._model, timer):
                yield timer.part
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        path = self._run_dir / TRACE
        try:
            recorded.export_chrome_trace(str(path))
        except OSError as error:
            log.warning("%s cannot be written (%s); training continues", path, error.strerror)


@contextmanager
def timed_step(model: GPT, timer: Timer) -> Iterator[None]:
    """Time the model's parts and what FSDP does around them."""
    with ExitStack() as stack:
        stack.enter_context(timed_gpt(model, timer))
        for module in model.modules():
            if isinstance(module, FSDPModule):
                _time_fsdp(module, timer, stack)
        yield


def _time_fsdp(module: FSDPModule, timer: Timer, stack: ExitStack) -> None:
    state = module._get_fsdp_state()
    for owner, parts in ((state, FSDP_STATE), (state._fsdp_param_group, FSDP_GROUP)):
        if owner is None:  # a module whose parameters are all in groups of its children
            continue
        for name, part in parts.items():
            timed = timer.timed(getattr(owner, name), part)
            stack.enter_context(replaced(owner, name, timed))


def untimed(name: str) -> AbstractContextManager[None]:
    return nullcontext()
