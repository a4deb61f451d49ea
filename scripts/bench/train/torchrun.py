"""torchrun as the benchmark starts it: ended by a signal, it shows no traceback of its own.

python -m scripts.bench.train.torchrun [torchrun's arguments]
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
