"""Train: `torchrun --nproc-per-node 2 -m train configs/demo_cpu.yaml moe.path=bf16 [key=value ...]`

One process needs no torchrun: `python -m train configs/demo_cpu.yaml parallel.expert_parallel=1`.
Exit codes: 0 done; 2 bad input, said in one line; 75 stopped by a signal, saved, start the same
command again; 1 anything else. torchrun itself exits with 1 whatever its ranks return.
"""

import argparse
import logging
import os
import sys
import time

from train.quiet import hush_imports

hush_imports()

from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from train.checkpoint import run_lock  # noqa: E402
from train.config import ConfigError, check_world, describe_keys, load, world_size_from_env  # noqa: E402
from train.failure import (  # noqa: E402
    STOP_FILE,
    Preempted,
    TrainingFailed,
    run_process,
    stop_file,
)

PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says when the other side of a connection has ended."""

PATIENCE_S = 5.0
"""How long a rank waits for another one to say what is the matter."""

WORKER_IS_GONE = "DataLoader worker"
"""What PyTorch's DataLoader says, wherever the main thread is at that moment."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description=__doc__,
        epilog=describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, such as configs/demo_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=50")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        # Before anything takes time: a restart by torchrun after a stop comes here again.
        if (path := stop_file()) is not None and path.exists():
            raise Preempted(f"{STOP_FILE}={path} is there already, so nothing was started")
        config = load(arguments.config, arguments.overrides)
        check_world(config, world_size_from_env())
        # These take seconds to import, which a spelling mistake need not wait for.
        from models.fp8 import operations

        if (reason := operations.why_te_is_broken()) is not None:
            raise ConfigError(reason)
        from train import loop, preflight
        from train.data import batches as data

        data.check(config)
        preflight.check(config)
        with run_lock.hold(config.run_dir):
            loop.train(config, data.load(config))
    except ConfigError as error:
        # One that a data worker met arrives with its traceback before it.
        line = str(error).strip().splitlines()[-1].removeprefix("train.config.ConfigError: ")
        _say(f"error: {line}")
        return 2
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":  # all of them stop, and for the same reason
            print(stop, file=sys.stderr, flush=True)
        return stop.exit_code
    except TrainingFailed as error:
        _say(f"error: {error}")
        return error.exit_code
    except Exception as error:
        if WORKER_IS_GONE in str(error):
            reason = " ".join(str(error).split())
            print(
                f"error: rank {os.environ.get('RANK', '0')}: a process that prepares data died "
                f"({reason}); where memory ran out, lower data.workers; started again, the "
                "training goes on from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            return 1
        # A rank that only lost its peers lets the one that failed report first: torchrun shows the
        # first report last, and ends everybody else.
        if any(sign in str(error) for sign in PEER_IS_GONE):
            time.sleep(PATIENCE_S)
            rank = os.environ.get("RANK", "0")
            print(
                f"error: rank {rank} lost another rank, whose end is reported by itself, torchrun "
                "or the system; started again, the training goes on from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            return 1
        if "NCCL" in str(error):
            time.sleep(PATIENCE_S)
        raise
    return 0


def _say(line: str) -> None:
    """Print what every rank may be about to say. torchrun ends them all when one has ended: the
    others give rank 0 time, and speak only if it is a matter of their machine alone."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE_S)
    print(line, file=sys.stderr, flush=True)


def run() -> None:
    """The training as a process of its own."""
    # `record` hands the error to torchrun, which prints it last, after all ranks have ended.
    run_process(record(main))


if __name__ == "__main__":
    run()
