"""How a run ends before its last step: one line, and an exit code for each kind."""

import errno
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from train.config import ConfigError
from train.safety import output
from train.safety.parent import end_with_torchrun

REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again."""

SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
"""Signals that ask a run to stop."""

STOP_FILE = "TRAIN_STOP_FILE"
"""A variable that names a file, for a caller that can neither signal the ranks nor see their exit
codes, such as a batch script around torchrun. When the file appears the run stops as after a
signal; once it has saved, for whatever reason it stopped, it writes `saved` into the file, which
means: requeue me. While the file exists, nothing starts."""

RESUMES = "resumes from the newest checkpoint, if there is one (checkpoint.every)"
"""What a run does when it is started again."""

PATIENCE_S = 3.0
"""How long a rank waits for another one to report what is wrong."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""A full disk, an exhausted quota, a read-only file system, `ulimit -f`."""

NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
"""A file of another user, a broken disk, a file system that is gone."""

PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""gloo's errors when the other side of a connection has ended."""

NO_ADDRESS = "Unable to find address for"
"""gloo's error about a network interface."""

NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "CUDA error: out of memory")
"""PyTorch's messages, besides its own error class, when a machine's or a GPU's memory is full."""

WORKER_IS_GONE = "DataLoader worker"
"""The DataLoader's error, raised wherever the main thread is at that moment."""


class TrainingFailed(Exception):
    """The run cannot continue. The text is the one line to print: what, where, what would work."""

    exit_code = 1


class NotFinite(TrainingFailed):
    """A loss or gradient is not finite; every rank raises it after the same step."""


class Preempted(TrainingFailed):
    """The run was asked to stop; everything up to here is saved."""

    exit_code = REQUEUE


class Ending(NamedTuple):
    """How this rank's process ends after an error."""

    line: str | None
    """The line to print; None where another rank prints it."""
    exit_code: int | None
    """None: the error is unexpected, and its traceback is wanted."""
    patience_s: float = 0.0
    """Seconds to wait first. torchrun ends all ranks when one has ended, and shows the first report
    last: so this rank lets another report first, and reports only if that one did not."""


def explain(error: Exception) -> Ending:
    """What to print about an error that ended the run, and how to end."""
    rank = os.environ.get("RANK", "0")
    # Every rank may be about to report this: the others do so only if it concerns their machine.
    after_the_first = 0.0 if rank == "0" else PATIENCE_S
    text = str(error)
    if isinstance(error, ConfigError):
        # A data worker's error arrives with its traceback before it.
        line = text.strip().splitlines()[-1].removeprefix("train.config.ConfigError: ")
        return Ending(f"error: {line}", 2, after_the_first)
    if isinstance(error, Preempted):  # all of them stop, and for the same reason
        return Ending(text if rank == "0" else None, error.exit_code)
    if isinstance(error, TrainingFailed):
        return Ending(f"error: {text}", error.exit_code, after_the_first)
    if WORKER_IS_GONE in text:
        return Ending(
            f"error: rank {rank}: a process that prepares data died ({' '.join(text.split())}); "
            "where memory ran out, that of /dev/shm too, lower data.workers; started again, "
            f"training {RESUMES}",
            1,
        )
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return Ending(
            f"error: rank {rank}: {error.filename or 'a file of the run'} cannot be written "
            f"({error.strerror}); free some space and start again, which {RESUMES}",
            1,
            after_the_first,
        )
    if isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename:
        return Ending(
            f"error: rank {rank}: {error.filename} cannot be used ({error.strerror}); give this "
            f"user the right to, or look at that disk, and start again, which {RESUMES}",
            1,
            after_the_first,
        )
    if NO_ADDRESS in text:
        there = ", ".join(name for _, name in socket.if_nameindex())
        return Ending(
            f"error: GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME')} is not a network "
            f"interface with an address here; unset it, or name one of {there}",
            2,
            after_the_first,
        )
    if any(sign in text for sign in NO_MEMORY):
        return Ending(
            f"error: rank {rank}: out of memory ({' '.join(text.split())[:120]}); lower "
            "train.micro_batch or model.seq_len, set moe.recompute=true, or share the model over "
            "more ranks",
            1,
        )
    if any(sign in text for sign in PEER_IS_GONE):
        return Ending(lost_another(rank), 1, PATIENCE_S)
    return Ending(None, None, PATIENCE_S if "NCCL" in text else 0.0)


def lost_another(rank: int | str, which: str = "") -> str:
    """What a rank reports that ends because another one, or that one, has ended."""
    name = f" (rank {which})" if which else ""
    return (
        f"error: rank {rank} lost another rank{name}; its own error line, torchrun or the system "
        f"says why; started again, training {RESUMES}"
    )


def stop_file() -> Path | None:
    """The file that TRAIN_STOP_FILE names, whether it exists or not."""
    path = os.environ.get(STOP_FILE)
    return Path(path) if path else None


def refuse_while_stopped() -> None:
    """Raise Preempted where the file exists already, ConfigError where it cannot be created."""
    path = stop_file()
    if path is not None and not path.parent.is_dir():
        raise ConfigError(
            f"{STOP_FILE}={path}: there is no folder {path.parent}; make it, or unset {STOP_FILE}"
        )
    if path is not None and path.exists():
        raise Preempted(f"{STOP_FILE}={path} is there already, so nothing was started")


def run_process(main: Callable[[], int | None]) -> None:
    """`main` as a process: the exit code is what it returns, and 1 after an error."""
    output.protect()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Before the first step Ctrl-C just ends the process, as SIGTERM does, without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_torchrun()
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # A failed rank must not wait for communication that will never come.
        os._exit(code)
    # At exit Python would spend two seconds looking for cycles in all that was imported.
    gc.freeze()
