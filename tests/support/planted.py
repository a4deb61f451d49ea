"""Run by tests that train on GPUs, one process a rank:

    python -m tests.support.planted FAULT ARGV...


What is forked cannot use a GPU that its parent has used, so these start anew. FAULT is `none`,
`poison` (rank 0's loss of step 5 is NaN) or `hang` (rank 1 never comes to step 4).
"""

import os
import sys

from tests.support.faults import hang, poison
from train.__main__ import run

FAULTS = {"none": lambda rank: None, "poison": poison(4, 0, float("nan")), "hang": hang}

if __name__ == "__main__":
    fault, *argv = sys.argv[1:]
    FAULTS[fault](int(os.environ["RANK"]))
    sys.argv = ["train", *argv]
    run()
