"""Run by tests that train on GPUs, one process a rank:

    python -m tests.support.planted FAULT ARGV...


What is forked cannot use a GPU that its parent has used, so these start again. FAULT is `none`,
`poison` (rank 0's loss of step 5 is NaN), `hang` (rank 1 never comes to step 4), `cramp` (steps 4,
5 and 7 have no room for the experts' rows), `crowd` (in steps 4 and 7 all tokens go to two),
`full` (rank 1's memory has no space for such room) or `stale` (most free memory is NaN).
"""

import os
import sys

from tests.support.faults import cramp, crowd, full, hang, poison, stale
from train.__main__ import run

FAULTS = {
    "none": lambda rank: None,
    "poison": poison(4, 0, float("nan")),
    "hang": hang,
    "cramp": cramp(3, 4, 6),  # on a GPU the first three wait
    "crowd": crowd(3, 6),
    "full": full,
    "stale": stale,
}

if __name__ == "__main__":
    fault, *argv = sys.argv[1:]
    FAULTS[fault](int(os.environ["RANK"]))
    sys.argv = ["train", *argv]
    run()
