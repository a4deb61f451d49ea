"""The colours of the paths, also of future paths."""

import itertools

import pytest

from models.config import PATH_NAMES
from scripts.compare.colors import COLORS, COVERED, Color, nth_color

MANY = [nth_color(place) for place in range(12)]


def rgb(color: str) -> list[float]:
    """#rrggbb as red, green and blue from 0 to 1."""
    return [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def luminance(color: str) -> float:
    """As WCAG 2 defines it."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb(color)]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_every_path_has_a_colour():
    assert tuple(COLORS) == PATH_NAMES
    assert {*COVERED, *COVERED.values()} <= {*PATH_NAMES}


@pytest.mark.parametrize("kind", Color._fields)
def test_colours_are_told_apart(kind):
    colors = [rgb(getattr(color, kind)) for color in MANY]
    for a, b in itertools.combinations(colors, 2):
        assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 0.1


def test_curves_can_be_seen_on_their_page():
    for color in MANY:
        assert contrast(color.light, "#ffffff") > 3
        assert contrast(color.dark, "#16171a") > 3
