"""Train: `torchrun --nproc-per-node 2 -m train configs/demo_cpu.yaml moe.path=bf16 [key=value ...]`

One process needs no torchrun: `python -m train configs/demo_cpu.yaml parallel.expert_parallel=1`.
Exit codes: 0 done; 2 bad input, reported in one line; 75 stopped by a signal and saved, start the
same command again; 1 anything else. torchrun itself exits with 1 whatever its ranks return.
"""

import argparse
import logging
import os
import sys
import time

from train import allocator, launch
from train.checkpoint import run_lock
from train.config import check_world, describe_keys, load, world_size_from_env
from train.failure import explain, refuse_while_stopped, run_process


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description=__doc__,
        epilog=describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, such as configs/demo_cpu.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="overrides, such as train.steps=50",
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        train(arguments.config, arguments.overrides)
    except Exception as error:
        ending = explain(error)
        time.sleep(ending.patience_s)
        if ending.exit_code is None:
            raise
        if ending.line is not None:
            print(ending.line, file=sys.stderr, flush=True)
        return ending.exit_code
    return 0


def train(path: str, overrides: list[str]) -> None:
    """Check everything that can be checked before anything starts, then train."""
    # Before anything takes time: a restart by torchrun after a stop comes here again.
    refuse_while_stopped()
    launch.check()
    config = load(path, overrides)
    check_world(config, world_size_from_env())
    allocator.choose()
    # These take seconds to import, which a spelling mistake need not wait for.
    from train import loop, preflight
    from train.data import batches as data

    data.check(config)
    preflight.check(config)
    with run_lock.hold(config.run_dir):
        loop.train(config, data.load(config))


def run() -> None:
    """The training process."""
    run_process(_recorded if "TORCHELASTIC_ERROR_FILE" in os.environ else main)


def _recorded() -> int | None:
    # Here, because it takes a second, which a spelling mistake without torchrun need not wait for.
    from torch.distributed.elastic.multiprocessing.errors import record

    # It hands the error to torchrun, which prints it last, after all ranks have ended.
    return record(main)()


if __name__ == "__main__":
    run()
