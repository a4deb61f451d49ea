"""Notes infinities inside the experts, which FP8 hides.

Saturation makes 448 times a scale of each, and loss and gradients look healthy. Whatever overflows
between two quantizations shows in a result of SwiGLU or of its backward pass, as an infinity or as
NaN, which quantizing keeps. So these two check what they write; rows of padding have the routing
weight 0, and give 0 or NaN. The note is on the device, so nothing waits for it.
"""

import torch
from torch import Tensor

_notes: dict[torch.device, Tensor] = {}


def note_on(device: torch.device) -> Tensor:
    """int32 [] of a device: not 0 after an infinity. The reader sets it back to 0."""
    if device not in _notes:
        _notes[device] = torch.zeros((), dtype=torch.int32, device=device)
    return _notes[device]


def look(values: Tensor) -> Tensor:
    """The same tensor; an infinity in it is noted. For the CPU, where a check waits for nothing."""
    if values.numel():
        low, high = values.aminmax()  # a tenth of the time of `isinf`
        found = low.isinf() | high.isinf()
        if low.isnan():  # covers the others
            found = values.isinf().any()
        note_on(values.device).logical_or_(found)
    return values
