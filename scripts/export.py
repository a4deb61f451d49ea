"""The whole model of a run in one safetensors file, with its config:

    python -m scripts.export runs/NAME --out model.safetensors [--step 200]

Whatever number of ranks trained it; needs memory for the weights, and no GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.model_file import find_checkpoint, read_checkpoint, write
from train.config import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, said in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    options = parser.parse_args(arguments)
    try:
        folder = find_checkpoint(options.run, options.step)
        weights, config, step = read_checkpoint(folder)
        write(options.out, weights, config, step)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(value.numel() for value in weights.values())
    print(f"{options.out}: {count:,} weights of {config.run.name} after step {step}, from {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
