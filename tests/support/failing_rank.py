"""Run by tests under torchrun: training in which rank 1 fails in its third step, by itself or with
PLANNED=kill as if somebody had killed it. Started again by torchrun it does not fail."""

import os
import signal

from train import __main__ as entry
from train import loop

real_step = loop.step
steps = 0


def step(*args):
    global steps
    steps += 1
    if steps == 3 and os.environ["RANK"] == "1":
        if os.environ.get("PLANNED") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the planted failure of rank 1")
    return real_step(*args)


if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    loop.step = step
entry.run()
