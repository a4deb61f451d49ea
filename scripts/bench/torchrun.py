"""torchrun as benchmarks start it: ended by a signal, it shows no traceback of its own.

    python -m scripts.bench.torchrun ARGUMENTS

ARGUMENTS are torchrun's.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
