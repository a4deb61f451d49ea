"""The random states of this process.

Training draws few random numbers: dropout is off, and data order follows from seed and step.
`moe.force_balance` routes by them.
"""

import random
from typing import NotRequired, TypedDict

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


class Drawn(TypedDict):
    """The generators that a training step draws from."""

    torch: torch.Tensor
    cuda: NotRequired[torch.Tensor]
    megatron: NotRequired[dict[str, torch.Tensor]]
    """megatron-core keeps some generators apart; on a CPU it has none."""


class RandomState(Drawn):
    """All states, of types that `torch.load(weights_only=True)` accepts."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[torch.Tensor, int, int, float]


def state(device: torch.device) -> RandomState:
    """Copies of the states."""
    numpy = np.random.get_state()
    assert isinstance(numpy, tuple)
    _, words, position, has_gauss, gauss = numpy
    keys = torch.from_numpy(words.astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": (keys, position, has_gauss, gauss),
        **drawn(device),
    }


def drawn(device: torch.device) -> Drawn:
    """Copies of PyTorch's and megatron-core's; the host holds them, so nothing waits for a GPU."""
    found: Drawn = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
        tracker = get_cuda_rng_tracker().get_states()
        found["megatron"] = {name: value.clone() for name, value in tracker.items()}
    return found


def restore(state: RandomState, device: torch.device) -> None:
    """Set what `state` returned; the state of another kind of device is ignored."""
    random.setstate(state["python"])
    keys, position, has_gauss, gauss = state["numpy"]
    words = keys.numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, gauss))
    redraw(state, device)


def redraw(state: Drawn, device: torch.device) -> None:
    """Draw again what was drawn since `drawn`."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
        get_cuda_rng_tracker().set_states(state["megatron"])
