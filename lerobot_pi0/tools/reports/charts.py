"""Curves as SVG, which takes its colours from the page and so can be read in the dark too."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .markup import Html, tag

WIDTH, HEIGHT = 360, 200
"""In units of which a phone shows one as one pixel."""

LEFT, RIGHT, TOP, BOTTOM = 44, 352, 24, 166
"""Where the curves are; around them stand labels and numbers."""

POINTS = 1000
"""Points of a curve, about: a screen shows no more."""


class Curve(NamedTuple):
    """Points, x (N) and y (N), and a class of colour, such as c1; `dotted` marks the first point."""

    x: np.ndarray
    y: np.ndarray
    colour: str
    dotted: bool = False


def chart(curves: Sequence[Curve], heading: str, x: str, low: float, high: float) -> Html:
    """Curves over one another.

    Args:
        heading: what is shown.
        x: what the horizontal axis shows.
        low, high: ends of the vertical axis; what goes beyond is drawn at its edge.
    """
    first, last = min(float(min(curve.x)) for curve in curves), max(float(max(curve.x)) for curve in curves)
    last, high = max(last, first + 1e-6), max(high, low + 1e-6)

    def across(value: float | np.ndarray) -> np.ndarray:
        return np.asarray(np.interp(value, (first, last), (LEFT, RIGHT))).round(1)

    def up(value: float | np.ndarray) -> np.ndarray:
        return np.asarray(np.interp(value, (low, high), (BOTTOM, TOP))).round(1)

    inside = [tag("text", heading, x=LEFT, y=14, class_="heading")]
    for value in ticks(low, high):
        inside.append(tag("line", x1=LEFT, x2=RIGHT, y1=up(value), y2=up(value)))
        inside.append(tag("text", f"{value:g}", x=LEFT - 6, y=up(value) + 4, text_anchor="end"))
    for value in ticks(first, last):
        inside.append(tag("text", f"{value:g}", x=across(value), y=BOTTOM + 14, text_anchor="middle"))
    inside.append(tag("text", x, x=RIGHT, y=HEIGHT - 4, text_anchor="end"))
    for curve in curves:
        every = max(1, len(curve.x) // POINTS)
        points = np.stack([across(curve.x[::every]), up(curve.y[::every])], axis=1)
        inside.append(tag("polyline", points=" ".join(f"{a},{b}" for a, b in points), class_=curve.colour))
        if curve.dotted:
            inside.append(tag("circle", cx=points[0, 0], cy=points[0, 1], r=2.5))
    return tag("svg", *inside, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=heading)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most so many and one."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(x for x in (1, 2, 5, 10) if high - low <= most * step * x)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
