"""Bytes that a rank sends to others in a step, and over which link."""

from dataclasses import dataclass
from typing import Literal

from scripts.plan import work
from train.planning.shapes import Shape

Link = Literal["NVLink", "network"]


@dataclass(frozen=True)
class Traffic:
    """One kind of a rank's traffic."""

    what: str
    link: Link
    bytes: float
    """A step, of this rank."""


def traffic(shape: Shape) -> list[Traffic]:
    """All kinds that there are; those without a byte left out."""
    count = shape.micro_batches
    ends = {"node": "NVLink", "network": "network"}
    found = [
        Traffic("tokens and gradients, dispatched and combined", ends[where], count * size)  # type: ignore[arg-type]
        for where, size in work.dispatched(shape).items()
    ]
    # A collective over several nodes is as fast as what is between them.
    collective: Link = "NVLink" if shape.ranks <= shape.node else "network"
    names = {"all": "all ranks", "replicas": "replicas of experts"}
    for who, size in work.gathered_bytes(shape).items():
        found.append(Traffic(f"weights gathered over {names[who]}", collective, count * size))
    for who, size in work.reduced_bytes(shape).items():
        found.append(Traffic(f"gradients reduced over {names[who]}", collective, size))
    return [one for one in found if one.bytes]
