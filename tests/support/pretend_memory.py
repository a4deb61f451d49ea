"""A GPU's memory, pretended: what an allocator would count, and an error where it would be full."""

from models.moe.room_memory import RowBytes


class PretendMemory:
    """`rest` bytes at the peak of every step beside what rows take, and what the optimizer makes
    in the first step and keeps from then on."""

    def __init__(self, rest: int, made_by_optimizer: int = 0) -> None:
        self.rest, self.moments = rest, 0
        self.made_by_optimizer = made_by_optimizer
        self.full = 0
        """The limit; 0 while there is none."""
        self._peak = self._kept = 0

    def peak(self) -> int:
        return self._peak

    def limit(self) -> int:
        return self.full

    def take(self, layer: int, rows: int, row: RowBytes) -> None:
        """A layer, in order, keeps its rows for its backward pass, which computes with them."""
        self._kept = (self._kept if layer else 0) + rows * row.kept
        now = self.rest + self.moments + self._kept + rows * row.computing
        assert not self.full or now <= self.full, f"out of memory: {now:,} of {self.full:,} bytes"
        self._peak = max(self._peak, now)

    def end_step(self, reset: bool) -> None:
        """The optimizer, and with `reset` a line of metrics, after which peaks are counted from
        here."""
        self.moments = self.made_by_optimizer
        if reset:
            self._peak = self.moments


def shares_fit(shares: float, even: int, layers: int, row: RowBytes) -> int:
    """Bytes of this many even shares of rows in every layer."""
    return int(shares * even * (layers * row.kept + row.computing))


def limit(ranks_shares: dict[int, float], even: int, layers: int):
    """In a training run: a limit for the rows of the ranks named, in even shares of every layer;
    the others have memory for any."""

    def plant(rank: int) -> None:
        from models.moe import room

        memory = PretendMemory(rest=10**9 * (1 + rank), made_by_optimizer=10**8)
        note = room.Room.note_memory

        def noted(self, layer, rows, row):
            note(self, layer, rows, row)
            if self._open:
                memory.take(layer, rows, row)
            if rows:  # otherwise nothing is known of a row
                shares = shares_fit(ranks_shares.get(rank, 100), even, layers, row)
                memory.full = memory.rest + memory.made_by_optimizer + shares

        opened = room.Room.open

        def ended(self, wait):
            if self._needs:
                memory.end_step(reset=False)
            return opened(self, wait)

        room.memory_of = lambda device: memory
        room.Room.note_memory = noted  # type: ignore[method-assign]
        room.Room.open = ended  # type: ignore[method-assign]
        room.WINDOW = 3

    return plant
