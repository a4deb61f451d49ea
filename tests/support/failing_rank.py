"""Run by tests under torchrun: training in which rank 1 fails in its third step, with an error or,
with PLANNED=kill, as if it had been killed. With PLANNED=spin the other rank then learns nothing,
as in a collective of NCCL. Started again by torchrun it does not fail."""

import os
import signal
import time
from pathlib import Path

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
        if "FAILED_AT" in os.environ:
            Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
        raise RuntimeError("the planted failure of rank 1")
    while steps == 3 and os.environ.get("PLANNED") == "spin":
        time.sleep(0.01)
    return real_step(*args)


if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    loop.step = step
entry.run()
