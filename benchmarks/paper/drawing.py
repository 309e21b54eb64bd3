"""Line charts as SVG that stands in a page: no script, no file beside it, readable in light and dark."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#c4314b", "#2f6fd0", "#1a7f4b", "#b7791f", "#7a4fc4", "#0f8b8d", "#8a5a44", "#59636e")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 600, 320, 46, 190, 16, 44
LINE = 15
"""The least distance of two labels."""


@dataclass(frozen=True)
class Axis:
    """One axis: what it counts, and where it is marked.

    Attributes:
        title: in words.
        marks: values with what is written there, in order.
        even: whether marks stand equally far apart, whatever their values.
    """

    title: str
    marks: Sequence[tuple[float, str]]
    even: bool = False

    def share(self, value: float) -> float:
        """How far along the axis a value lies, from 0 to 1."""
        values = [mark for mark, _ in self.marks]
        if self.even:
            return values.index(value) / max(len(values) - 1, 1)
        return (value - values[0]) / (values[-1] - values[0])


def chart(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], x: Axis, y: Axis) -> str:
    """Lines, each named at its end; those of nothing are left out.

    Args:
        title: for those who cannot see it.
        lines: the points of each, from left to right.
        x: the axis below.
        y: the axis at the left.
    """

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across, up = x.share(point[0]), y.share(point[1])
        return LEFT + (WIDTH - LEFT - RIGHT) * across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - up)

    shown = {name: [place(point) for point in points] for name, points in lines.items() if points}
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">', *_axes(x, y)]
    ends = _apart({name: points[-1][1] for name, points in shown.items()})
    colours = dict(zip(lines, itertools.cycle(COLOURS), strict=False))  # of one name the same, whatever else is there
    for name, points in shown.items():
        colour, path = colours[name], " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        end = WIDTH - RIGHT + 16
        parts.append(
            f'<path d="M{points[-1][0]:.1f} {points[-1][1]:.1f}L{end - 4} {ends[name]:.1f}" stroke="{colour}"/>'
        )
        parts.append(f'<text x="{end}" y="{ends[name] + 4:.1f}" style="fill:{colour}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _axes(x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="currentColor"/>']
    for value, said in x.marks:
        across = LEFT + (right - LEFT) * x.share(value)
        parts.append(f'<text x="{across:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(said)}</text>')
    for value, said in y.marks:
        down = TOP + (bottom - TOP) * (1 - y.share(value))
        parts.append(f'<path d="M{LEFT} {down:.1f}H{right}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{escape(said)}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.title)}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 5}" text-anchor="start">{escape(y.title)}</text>')
    return parts


def _apart(heights: Mapping[str, float]) -> dict[str, float]:
    """Heights at least :data:`LINE` apart, in their order, none lower than the axis lets it be."""
    found: dict[str, float] = {}
    last = -LINE * 1.0
    for name in sorted(heights, key=heights.__getitem__):
        last = found[name] = max(heights[name], last + LINE)
    too_low = max(0.0, last - (HEIGHT - BOTTOM))
    return {name: height - too_low * (place + 1) / len(found) for place, (name, height) in enumerate(found.items())}
