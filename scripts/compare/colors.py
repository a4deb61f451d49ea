"""A colour for each path, by its place in the list of paths, so that a new one gets its own.

The first are Okabe and Ito's, told apart by the colour-blind too.
"""

import colorsys
from typing import NamedTuple

from models.config import PATH_NAMES


class Color(NamedTuple):
    """One path's, as #rrggbb."""

    paper: str
    """The colour in `compare.png`, black on white."""
    light: str
    """The colour on the page: a darker one where Okabe and Ito's is too pale for thin lines."""
    dark: str
    """The colour on a dark page."""


CHOSEN = (
    Color("#767676", "#767676", "#a9a9b0"),
    Color("#D55E00", "#d55e00", "#f0883e"),
    Color("#0072B2", "#0072b2", "#56b4e9"),
    Color("#009E73", "#00805d", "#2fc598"),
    Color("#CC79A7", "#b0528a", "#e79ac6"),
    Color("#E69F00", "#9a6a00", "#f0c75e"),
)

COVERED = {
    "fp8_baseline": "fp8_compact",  # the same arithmetic with fewer relayouts
    "fp8_direct": "fp8_fused",  # the same in fewer steps
}
"""A path, and the one that trains to the same bits and whose curve is drawn over its own."""


def nth_color(place: int) -> Color:
    """The colour of the path at this place, also where there are more than were chosen by hand."""
    if place < len(CHOSEN):
        return CHOSEN[place]
    hue = place * 0.618034 % 1  # the golden ratio: no two come close for long
    return Color(*(_hex(hue, lightness) for lightness in (0.4, 0.3, 0.7)))


def _hex(hue: float, lightness: float) -> str:
    return "#" + "".join(
        f"{round(value * 255):02x}" for value in colorsys.hls_to_rgb(hue, lightness, 0.75)
    )


COLORS: dict[str, Color] = {path: nth_color(place) for place, path in enumerate(PATH_NAMES)}
