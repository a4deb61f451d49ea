"""Where documents lie in a batch whose tokens attend within their own only."""

from typing import NamedTuple

from torch import Tensor


class Documents(NamedTuple):
    """The D documents, or parts of them, among all tokens of a batch, one sequence after another.

    Found where a batch is made, on the host: on a GPU, looking for them would make it wait.
    """

    bounds: Tensor
    """int32 [D + 1]: where each begins, and where the last one ends."""
    longest: int
    """Tokens of the longest one."""
