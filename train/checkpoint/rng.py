"""The random states of this process.

Training draws little: dropout is off, and data order follows from seed and step.
`moe.force_balance` routes by them.
"""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def state(device: torch.device) -> dict[str, Any]:
    """Copies, of types that `torch.load(weights_only=True)` takes."""
    _, keys, *rest = np.random.get_state()
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
        # megatron-core keeps some generators apart; on a CPU it has none.
        tracker = get_cuda_rng_tracker().get_states()
        found["megatron"] = {name: value.clone() for name, value in tracker.items()}
    return found


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Set what `state` returned; what belongs to another kind of device is left alone."""
    random.setstate(state["python"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
        get_cuda_rng_tracker().set_states(state["megatron"])
