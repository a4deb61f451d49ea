"""A model whose parts are timed inside a `with`, and unchanged after it.

    timer = Timer(device)
    with timed_gpt(model, timer):
        timer.start()
        model(tokens, labels).sum().backward()
        lap = timer.stop()

Nothing is added to the model's code: for that time, some functions of its objects are others.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.gpt import GPT
from train.profiling import moe
from train.profiling.timer import Timer

PARTS = ("attention", "router", *moe.PARTS)
"""Parts of a model's forward and backward pass. The rest is norms, embedding, output layer, loss,
shared experts, and what lies between."""


@contextmanager
def timed_gpt(model: GPT, timer: Timer) -> Iterator[None]:
    """Time attention, router and the experts' parts of every layer, forward and backward."""
    runtime = moe.timed_runtime(model.runtime, timer)
    with ExitStack() as stack:
        for layer in model.decoder.layers:
            for module, name in ((layer.self_attention, "attention"), (layer.mlp.router, "router")):
                forward = timed_forward(module, timer, name)
                stack.enter_context(replaced(module, "forward", forward))
            stack.enter_context(replaced(layer.mlp.experts, "runtime", runtime))
        yield


def timed_forward(module: nn.Module, timer: Timer, name: str) -> Callable[..., Any]:
    """The module's `forward` as a part, and its backward pass, which hooks begin and end.

    Backward begins when the gradient of the first output is there, and ends when that of the first
    argument is. The argument is seen through a view, so that the end does not wait for gradients
    that others contribute to the same tensor.
    """
    forward = module.forward

    def wrapper(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        backward = torch.is_grad_enabled() and x.requires_grad
        opened = False

        def begin(grad: Tensor) -> None:
            nonlocal opened
            opened = timer.begin(name)

        def end(grad: Tensor) -> None:
            if opened:
                timer.end()

        if backward:
            x = x.view_as(x)
            x.register_hook(end)
        with timer.part(name):
            output = forward(x, *args, **kwargs)
        if backward:
            (output[0] if isinstance(output, tuple) else output).register_hook(begin)
        return output

    return wrapper


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the `with`, on this object alone."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
