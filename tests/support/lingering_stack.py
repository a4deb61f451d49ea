"""Run by tests instead of scripts.bench.measure: ranks that measure, and then cannot end."""

import os
import sys
import time
from pathlib import Path

from scripts.bench.results import write_json

if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        results = []
        for size in sys.argv[sys.argv.index("--micro-batches") + 1].split(","):
            time.sleep(3)
            results.append({"micro_batch": int(size)})
            write_json(Path(sys.argv[sys.argv.index("--out") + 1]), {"results": results})
    time.sleep(600)
