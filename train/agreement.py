"""What only all ranks together can know, compared once, right after they have met.

Rank 0 publishes what it was started with and whether the run is finished; every other rank answers
with what differs; and all of them read the result. They talk through the store, since a collective
of ranks that disagree, even about the device, would hang.
"""

import json
import secrets
import socket
import time
from pathlib import Path
from typing import Any, TypedDict

import torch.distributed as dist

from train.checkpoint.progress import waiting
from train.checkpoint.same_run import already_trained
from train.config import Config, ConfigError
from train.data.batches import Corpus
from train.failure import TrainingFailed
from train.metrics.environment import versions
from train.parallel import Peers
from train.preflight import resolve_device

MAY_DIFFER = {"run.dir", "run.group", "run.tags", "data.workers"}
"""Keys that differ between ranks, or that only rank 0 reads. Whether `run.dir` is one folder is
tested."""

ONLY_RANK_0 = ("tracking",)
"""Sections that only rank 0 reads."""

WHERE_DATA_IS = {"data.path", "data.tokenizer"}
"""May differ too, where a fingerprint tells whether the data is the same."""

SHARED_S = 10.0
"""How long a file of rank 0's may take to be seen on another node."""


class Told(TypedDict):
    """What a rank was started with."""

    host: str
    keys: dict[str, Any]
    data: dict[str, Any]
    """The fingerprint of the data; empty where there is none."""
    versions: dict[str, str]
    device: str
    finished: bool
    """Whether the run has completed its last step, as rank 0 finds it."""
    token: str
    """Content of a file that rank 0 has written into the run's folder."""


def agree(peers: Peers, config: Config, corpus: Corpus) -> bool:
    """Whether the run is finished already, which rank 0 decides for all.

    Raises ConfigError, on every rank, where they were started with other keys or other data, or do
    not share `run.dir`.
    """
    try:
        return _agree(peers, config, corpus)
    except dist.DistError as error:
        raise TrainingFailed(
            f"rank {peers.rank} heard nothing from the others at the start: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None


def _agree(peers: Peers, config: Config, corpus: Corpus) -> bool:
    store, rank, others = peers.store, peers.rank, range(1, peers.world_size)
    told = _told(config, corpus)
    if rank == 0:
        mark = _mark(config, told["token"])
        reason = _leave(mark, config)
        if not reason:
            told["finished"] = already_trained(config)
        store.set("told", json.dumps(told))
        said = [_hear(peers, f"said by {other}", other) for other in others]
        mark.unlink(missing_ok=True)
        store.set("result", reason or next(filter(None, said), ""))
    else:
        first: Told = json.loads(_hear(peers, "told", 0))
        store.set(
            f"said by {rank}", difference(first, told, rank) or not_shared(first, config, rank)
        )
        told["finished"] = first["finished"]
    reason = _hear(peers, "result", 0)
    store.set(f"heard by {rank}", "")
    if rank == 0:  # which may hold the store, and must not end before the others have heard
        store.wait([f"heard by {other}" for other in others] or ["result"])
    if reason:
        raise ConfigError(reason)
    return told["finished"]


def _hear(peers: Peers, key: str, other: int) -> str:
    """What another rank says, or rank 0 to itself; until then a line on stderr names it."""
    with waiting(f"rank {peers.rank} waits for rank {other} to start"):
        return peers.store.get(key).decode()


def difference(first: Told, here: Told, rank: int) -> str:
    """What this rank was started with and rank 0 was not, in one line; nothing if they agree."""
    both = f"rank {rank} on {here['host']} and rank 0 on {first['host']}"
    differ = MAY_DIFFER | (WHERE_DATA_IS if first["data"] and here["data"] else set())
    if keys := _unlike(first["keys"], here["keys"], without=differ):
        return f"{both} were started with different keys ({keys}); start all with the same"
    if data := _unlike(first["data"], here["data"]):
        return f"{both} read different data ({data}); give all of them the same files"
    what = {"device": first["device"], **first["versions"]}
    if unlike := _unlike(what, {"device": here["device"], **here["versions"]}):
        return f"{both} do not run the same ({unlike}); start all in the same environment"
    return ""


def _unlike(first: dict[str, Any], here: dict[str, Any], without: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    return "; ".join(
        f"{key}: {here.get(key)} and {first.get(key)}"
        for key in {**first, **here}
        if key not in without and here.get(key) != first.get(key)
    )


def not_shared(first: Told, config: Config, rank: int) -> str:
    """Why this rank's run folder is not that of rank 0, in one line; nothing where it is."""
    mark = _mark(config, first["token"])
    deadline = time.monotonic() + SHARED_S
    while not mark.exists():
        if time.monotonic() > deadline:
            return (
                f"run.dir={config.run.dir} of rank {rank} on {socket.gethostname()} is not the "
                f"folder of rank 0 on {first['host']}: what that writes is not seen here; put "
                "run.dir on a file system that all nodes share"
            )
        time.sleep(0.1)
    return ""


def _told(config: Config, corpus: Corpus) -> Told:
    sections = config.model_dump(mode="json")
    return {
        "host": socket.gethostname(),
        "keys": {
            f"{section}.{key}": value
            for section, keys in sections.items()
            if section not in ONLY_RANK_0
            for key, value in keys.items()
        },
        "data": corpus.fingerprint(),
        "versions": versions(),
        "device": resolve_device(config),
        "finished": False,
        "token": secrets.token_hex(8),
    }


def _mark(config: Config, token: str) -> Path:
    return config.run_dir / f"started_{token}"


def _leave(mark: Path, config: Config) -> str:
    """Write the file that the others must see; why it cannot be written, if so."""
    try:
        for old in mark.parent.glob("started_*"):  # of a start that was killed
            old.unlink()
        mark.touch()
    except OSError as error:
        return f"run.dir={config.run.dir}: {error.strerror}"
    return ""
