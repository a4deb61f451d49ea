"""What the training benchmarks measure, each a `Stack`: our paths, and stock megatron-core.

spec.py             a stack's name and flags, and the config that it trains with
inputs.py           batches and seeds, which do not depend on the stack
ours.py             our paths
stock_megatron.py   stock megatron-core
  rungs.py            its flags
  stock_settings.py   what they and our config set
  same_weights.py     its initial weights, which are ours
"""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from scripts.bench.stacks.ours import Ours
from scripts.bench.stacks.spec import Spec
from train.config import Config
from train.data.batches import Batch
from train.parallel import Ranks


class Stack(Protocol):
    """A model with its optimizer, ready to train."""

    dispatch: str
    description: str

    @property
    def model(self) -> nn.Module: ...

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """One optimizer step; this rank's share of the mean loss: ranks add up to it."""

    def dropped_rows(self) -> int:
        """Rows dropped on this rank since the last call. Waits for the device."""

    def redone_steps(self) -> int:
        """Steps that were repeated for lack of room since the last call."""

    def waited_steps(self) -> int:
        """Steps that waited because room would not have fitted into memory, since the last call."""

    def room(self) -> float | None:
        """Room for the experts' rows in the last step, in even shares of a rank; None where every
        layer waits."""

    def close(self) -> None:
        """Release what outlives the model. All ranks together."""


def build(spec: Spec, config: Config, ranks: Ranks) -> Stack:
    """The stack on this rank. All ranks together."""
    if spec.stack == "ours":
        return Ours(config, ranks, spec.flags)
    from scripts.bench.stacks.stock_megatron import StockMegatron

    return StockMegatron(config, ranks, spec.path, spec.flags)
