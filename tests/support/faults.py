"""What makes a run fail, planted in a rank before it starts."""

import ctypes
import time


def poison(step: int, rank: int, value: float):
    """Make the loss of one micro-batch of one rank NaN or infinite."""

    def plant(this_rank: int) -> None:
        from train import loop

        real_step, real_losses = loop.step, loop.losses
        now = [-1, 0]

        def counted(training, *args):
            now[:] = [training.done, 0]
            return real_step(training, *args)

        def losses(*args):
            out = real_losses(*args)
            now[1] += 1
            bad = now == [step, 2] and this_rank == rank
            return out * (value if bad else 1.0)

        loop.step, loop.losses = counted, losses

    return plant


def quick_watchdog(rank: int) -> None:
    """Ranks of one machine write and read their positions faster than nodes do."""
    from train.safety import watchdog

    watchdog.GRACE_S, watchdog.GATHER_S, watchdog.END_S = 1.0, 2.0, 7.0


def hang(rank: int) -> None:
    """Rank 1 never comes to step 4."""

    from train import loop
    from train.safety import watchdog

    quick_watchdog(rank)

    step = loop.step

    def stuck(training, *args):
        while rank == 1 and training.done == 3:
            time.sleep(0.01)
        return step(training, *args)

    loop.step = stuck

    # The rank that reports starts last: the other must not end before it has reported.
    report = watchdog.Watchdog._report

    def late(self):
        time.sleep(1 if rank == 0 else 0)
        report(self)

    watchdog.Watchdog._report = late  # type: ignore[method-assign]


def hang_with_the_lock(stuck: set[int]):
    """Ranks that never come to step 4, in C code that keeps Python's global lock."""

    def plant(rank: int) -> None:
        from train import loop

        quick_watchdog(rank)
        step = loop.step

        def sleeping(training, *args):
            if rank in stuck and training.done == 3:
                ctypes.PyDLL(None).sleep(300)
            return step(training, *args)

        loop.step = sleeping

    return plant


def cramp(*steps: int):
    """Almost no room for rows in these steps, counted from 0, and NaN losses where rows are lost:
    nothing of such an attempt may remain.

    In the others there is room for all: how evenly so few tokens are routed follows from the text,
    and a step's need may be more than room for what the last ones needed.
    """

    def plant(rank: int) -> None:
        from models.fp8.tensor import BLOCK, ceil_div
        from models.moe.room import Room
        from train import loop

        step, losses, max_rows = loop.step, loop.losses, Room.max_rows
        now = [-1]

        def counted(training, *args):
            now[0] = training.done
            return step(training, *args)

        def cramped(self, layer, even, most, alignment):
            rows = max_rows(self, layer, even, most, alignment)
            if rows is None:
                return None
            # Every path's alignment is enough where rows are lost; `alignment` may be large.
            rows = BLOCK if now[0] in steps else ceil_div(most, alignment) * alignment
            self.rows[layer] = rows
            return rows

        def poisoned(model, *args):
            out = losses(model, *args)
            room = model.runtime.room
            lost = model.training and room is not None and any(room.rows)
            return out * (float("nan") if lost and now[0] in steps else 1.0)

        loop.step, loop.losses = counted, poisoned
        Room.max_rows = cramped  # type: ignore[method-assign]

    return plant


def crowd(*steps: int):
    """In these steps, counted from 0, every router sends all tokens of the last micro-batch to
    experts 0 and 1."""

    def plant(rank: int) -> None:
        from models.moe.layer import Router
        from train import loop

        step, losses, gating = loop.step, loop.losses, Router.gating
        chosen, batches, accumulation = [False], [0], [1]

        def begun(training, *args):
            chosen[0], batches[0] = training.done in steps, 0
            accumulation[0] = training.config.accumulation(training.ranks.world_size)
            return step(training, *args)

        def counted(*args):
            batches[0] += 1  # on through a step's second attempt
            return losses(*args)

        def crowded(self, input):
            logits = gating(self, input)
            if self.training and chosen[0] and batches[0] % accumulation[0] == 0:
                logits[..., :2] += 100
            return logits

        loop.step, loop.losses = begun, counted
        Router.gating = crowded  # type: ignore[method-assign]

    return plant


def full(rank: int) -> None:
    """As if rank 1's GPU had no memory for room, though all tensors fit."""
    from models.moe.room_memory import GpuMemory

    if rank == 1:
        GpuMemory.limit = lambda self: 1  # type: ignore[method-assign]


def stale(rank: int) -> None:
    """Before each step most of the memory that is free has all bits set: NaN in every float."""
    import torch

    from train import loop

    step = loop.step
    # The largest first: what they leave of a block is filled by smaller ones.
    sizes = [1 << n for n in range(26, 8, -1) for _ in range(24 if n > 19 else 100)]

    def spoiled(training, *args):
        device = training.ranks.device
        used = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]
        del used
        return step(training, *args)

    loop.step = spoiled
