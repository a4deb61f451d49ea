"""When one rank has ended, the others end within seconds, whatever they wait for.

gloo reports at once that the other side is gone. NCCL spins, and torchrun kills a spinning rank
only after 30 s. So each rank has a small process beside it, its sentinel: when the rank ends
without signing off, the sentinel notes it in the store, and the other ranks' sentinels, which poll
it, tell theirs. A process, since it must outlive its rank, and since a rank that waits in C code
may hold Python's global lock, and then no thread of it runs: such a rank is ended by SIGALRM, at
which it writes its stack (see watchdog.py).
"""

import mmap
import os
import signal
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from train.failure import SIGNALS, lost_another
from train.parallel import Peers
from train.safety import output

EVERY_S = 0.25
"""How often a sentinel looks."""

GRACE_S = 2.0
"""How long a rank has to raise an error of its own, which says more."""

ALARM_S = 1.0
"""How much later SIGALRM follows, where the rank does not react; and after that SIGKILL."""


class Lifeline:
    """Open while this rank depends on the others; an error that closes it is this rank's own."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._sentinel = 0
        self._leaving = mmap.mmap(-1, 1)  # shared with the sentinel

    def __enter__(self) -> "Lifeline":
        if self.peers.world_size > 1:
            read, write = os.pipe()
            rank = os.getpid()
            self._sentinel = os.fork()
            if not self._sentinel:
                try:
                    _Sentinel(self.peers.rank, rank, write, self._leaving).watch()
                finally:
                    os._exit(0)
            os.close(write)
            threading.Thread(
                target=self._listen, args=(read,), name="lifeline", daemon=True
            ).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.leave()
        if kind is None and self._sentinel:
            os.kill(self._sentinel, signal.SIGKILL)
            os.waitpid(self._sentinel, 0)

    def leave(self) -> None:
        """From here on this rank no longer depends on the others."""
        self._leaving[0] = 1

    def _listen(self, pipe: int) -> None:
        lost = os.read(pipe, 20)
        if not lost:
            return
        time.sleep(GRACE_S)
        if not self._leaving[0]:
            output.last_words(lost_another(self.peers.rank, lost.decode()))
            os._exit(1)


class _Sentinel:
    """The process beside a rank."""

    def __init__(self, rank: int, process: int, pipe: int, leaving: mmap.mmap) -> None:
        self.rank, self.process, self.pipe, self.leaving = rank, process, pipe, leaving
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.key = f"lost in start {restart}"

    def watch(self) -> None:
        for number in SIGNALS:  # sent to all processes of a job: the sentinel ends with its rank
            signal.signal(number, signal.SIG_IGN)
        # Or the rank's connections, and its GPU's memory, would live on with this process.
        os.closerange(3, self.pipe)
        os.closerange(self.pipe + 1, min(os.sysconf("SC_OPEN_MAX"), 1 << 20))
        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False)
            while self._rank_lives():
                time.sleep(EVERY_S)
                if store.check([self.key]):
                    self._tell(store.get(self.key).decode())
                    return
            store.set(self.key, str(self.rank))
        except RuntimeError:
            # The store is torchrun's, whose end ends its ranks, or rank 0's.
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._tell("0")

    def _tell(self, lost: str) -> None:
        with suppress(OSError):
            os.write(self.pipe, lost.encode())
        self._wait(GRACE_S + ALARM_S)
        for number in (signal.SIGALRM, signal.SIGKILL):
            if self._rank_lives() and not self.leaving[0]:
                os.kill(self.process, number)
                self._wait(ALARM_S)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._rank_lives() and time.monotonic() < deadline:
            time.sleep(EVERY_S)

    def _rank_lives(self) -> bool:
        return os.getppid() == self.process
