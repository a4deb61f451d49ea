"""The copy of a run's state from which a save is written while training continues."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class HostCopy:
    """Copies of a state's tensors in the host's memory, in the same place every time.

    Copying overlaps with the next step's forward and backward pass, which change no weight:
    `wait_before_update` must be called before the optimizer does. DCP's own stager allocates new
    memory for every save, which takes ten times as long as the copy.
    """

    def __init__(self, device: torch.device) -> None:
        """`device` is where the state is."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="host copy")
        self._copies: Future[list[Tensor | None]] | None = None
        self._copying: Future[None] | None = None
        self._copied: torch.cuda.Event | None = None

    def allocate(self, state: STATE_DICT_TYPE) -> None:
        """Allocate the memory for copies of such a state during a training step. For a GPU it takes
        a second a gigabyte, for most of which the driver stalls that step's kernels: once a run,
        and not when something is to be saved."""
        leaves, _ = tree_flatten(state)
        self._copies = self._thread.submit(self._allocate, leaves)

    def _allocate(self, leaves: Sequence[object]) -> list[Tensor | None]:
        # On a thread of its own the current GPU would be the first.
        with torch.cuda.device(self._device) if self._stream else nullcontext():
            return [_like(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]

    def begin(self, state: STATE_DICT_TYPE) -> Future[STATE_DICT_TYPE]:
        """The current state, once it is copied; it overwrites the previous copy."""
        if self._copies is None:
            self.allocate(state)
        assert self._copies is not None
        copies = self._copies.result()
        leaves, structure = tree_flatten(state)
        filled = [leaf if copy is None else copy for leaf, copy in zip(leaves, copies, strict=True)]
        pairs = [
            (_local(leaf), _local(copy))
            for leaf, copy in zip(leaves, copies, strict=True)
            if copy is not None
        ]
        if self._stream is None:
            self._copying = self._thread.submit(_copy, pairs)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                _copy(pairs)
                self._copied = torch.cuda.Event()
                self._copied.record()
            self._copying = self._thread.submit(self._copied.synchronize)
        copying = self._copying

        def finished() -> STATE_DICT_TYPE:
            copying.result()
            return tree_unflatten(filled, structure)

        return self._thread.submit(finished)

    def wait_before_update(self) -> None:
        """Wait until the state may change, as all of it is copied. The GPU waits, not its host."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        elif self._copying is not None:
            self._copying.result()
        self._copied = self._copying = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


@torch.no_grad()
def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for source, target in pairs:
        target.copy_(source, non_blocking=True)


def _like(t: Tensor) -> Tensor:
    """Memory for a copy, in the host."""
    if isinstance(t, DTensor):
        # PyTorch's own `to("cpu")` would copy all of it for this.
        return DTensor(_like(t._local_tensor), t._spec, requires_grad=False)  # type: ignore[no-any-return]
    pinned = t.is_cuda and t.numel() > 0
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned)


def _local(t: Tensor) -> Tensor:
    return t._local_tensor if isinstance(t, DTensor) else t
