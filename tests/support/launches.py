"""What PyTorch would launch on a GPU, counted on any device."""

from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode

FREE = {
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_strided", "expand", "new_empty",
    "permute", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze",
    "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
"""Operations that give memory or another view of it, which is the host's alone."""


class Launches(TorchDispatchMode):
    """The operations that are called inside of the `with`, except for those that launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self._paused and name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def one(self, name: str, function):
        """The function as one operation of that name, whatever it calls."""

        def wrapper(*args, **kwargs):
            self.names.append(name)
            with self._pause():
                return function(*args, **kwargs)

        return wrapper

    @contextmanager
    def _pause(self):
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before
