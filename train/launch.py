"""How this process was started: either all of torchrun's variables are set, or none."""

import os
import socket

from train.checkpoint.progress import waiting
from train.config import ConfigError

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets, by which ranks find each other."""

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")

OTHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
"""Other launchers of several processes, by the variable that holds their number."""


def check() -> None:
    """Raise ConfigError where several processes would each train alone."""
    environment = os.environ
    _check_numbers()
    if "RANK" not in environment:
        for variable, launcher in OTHERS.items():
            number = environment.get(variable, "1")
            if number not in ("", "0", "1"):
                raise ConfigError(
                    f"{launcher} started {number} processes ({variable}={number}), and each would "
                    f"be a run of its own; let {launcher} start one torchrun a node: torchrun "
                    "--nproc-per-node N -m train ..., as slurm/train.sbatch does"
                )
        return
    missing = [variable for variable in TORCHRUN if not environment.get(variable)]
    if missing:
        raise ConfigError(
            f"RANK={environment['RANK']} is in the environment without {' and '.join(missing)}, "
            "which torchrun sets beside it; start with torchrun, or unset RANK"
        )
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= ranks:
        raise ConfigError(
            f"RANK={rank} is none of the WORLD_SIZE={ranks} ranks, which count from 0; start with "
            "torchrun, which sets both"
        )
    _check_address(environment["MASTER_ADDR"])


def _check_address(host: str) -> None:
    """Raise ConfigError where the ranks are to meet on a host that this machine cannot resolve:
    PyTorch would try until its time-out."""
    try:
        with waiting(f"MASTER_ADDR={host} is looked up"):
            socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no host is called so"
        raise ConfigError(
            f"MASTER_ADDR={host} cannot be found from {socket.gethostname()} ({reason}); give the "
            "name or address by which all nodes know the machine of rank 0 (torchrun "
            "--rdzv-endpoint HOST:PORT, or --master-addr HOST)"
        ) from None


def _check_numbers() -> None:
    """Raise ConfigError for a number that is invalid or out of range."""
    for variable in NUMBERS:
        text = os.environ.get(variable, "1")
        if not (text.isascii() and text.isdigit()):
            raise ConfigError(f"{variable}={text} in the environment is not a number; unset it")
        if int(text) < variable.endswith("SIZE") or int(text) >= 1 << 16:
            raise ConfigError(f"{variable}={text} in the environment makes no sense; unset it")
