"""What moves tokens between ranks: one interface, two implementations."""

from typing import Any, Protocol

from torch import Tensor


class Dispatcher(Protocol):
    """Dispatch and combine, each the other's backward. Shapes are in `all_to_all.py`."""

    name: str
    bytes_sent: int

    def dispatch(
        self, tensors: tuple[Tensor, ...], expert_ids: Tensor, weights: Tensor, wait: bool = True
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Any]: ...

    def dispatch_again(self, tensors: tuple[Tensor, ...], handle: Any) -> tuple[Tensor, ...]: ...

    def combine(
        self, x: Tensor, handle: Any, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]: ...

    def close(self) -> None: ...
