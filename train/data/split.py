"""Which documents are held out for validation: a hash of the text decides.

So a document stays on its side when others are added, moved or removed, and copies of it are on the
same side. Neither the seed nor the number of ranks matters.
"""

import hashlib
from collections.abc import Iterable, Sequence


def digest(pieces: Iterable[str]) -> bytes:
    """A hash of a document's text, 16 bytes."""
    found = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        found.update(piece.encode("utf-8", "surrogatepass"))
    return found.digest()


def place(digest: bytes) -> int:
    """Where a document lies in 0 to 2^64, evenly; those below a limit are held out."""
    return int.from_bytes(digest[:8], "big")


def limit(fraction: float, places: Sequence[int] = ()) -> int:
    """The place below which this share of the documents is held out.

    With the places of a whole corpus: such that at least one document is held out. Adding a
    document can then move that one to training, but never one from training to validation.
    """
    lowest = min(places, default=-1) + 1
    return max(int(fraction * 2**64), lowest)
