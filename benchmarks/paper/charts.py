"""Line charts as SVG text for an HTML page, drawn with matplotlib and readable in light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from remend.evaluation.reports.figure_style import INK, as_svg

COLORS = ("#c4314b", "#2f6fd0", "#1a7f4b", "#b7791f", "#7a4fc4", "#0f8b8d", "#8a5a44", "#59636e")


@dataclass(frozen=True)
class Axis:
    """An axis with its title and its ticks.

    Attributes:
        title: what it counts.
        ticks: values with their labels, in order.
        evenly_spaced: whether ticks are equally far apart, whatever their values.
    """

    title: str
    ticks: Sequence[tuple[float, str]]
    evenly_spaced: bool = False

    def position(self, value: float) -> float:
        """Return the coordinate of a value: its tick's index if ticks are evenly spaced, else the value."""
        return [tick for tick, _ in self.ticks].index(value) if self.evenly_spaced else value


def line_chart(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], x: Axis, y: Axis) -> str:
    """Draw lines with a legend, and return an ``<svg>`` element.

    Args:
        title: the description for screen readers.
        lines: the points of each line by name; a line without points is left out.
        x: the horizontal axis.
        y: the vertical axis.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text. The salt makes ids the same in every run, and different between the charts of one page.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title}
    style |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        # A name has the same color in every chart, so colors are counted over all names, also those without points.
        for number, (name, points) in enumerate(lines.items()):
            if points:
                axes.plot(
                    [x.position(value) for value, _ in points],
                    [y.position(value) for _, value in points],
                    color=COLORS[number % len(COLORS)],
                    marker="o",
                    markersize=4,
                    label=name,
                    gid=f"line:{name}",
                )
        axes.set_xlabel(x.title)
        axes.set_ylabel(y.title)
        axes.set_xticks([x.position(value) for value, _ in x.ticks], [label for _, label in x.ticks])
        axes.set_yticks([y.position(value) for value, _ in y.ticks], [label for _, label in y.ticks])
        axes.grid(axis="y", alpha=0.15)
        # Beside the axes, in the order of the lines' ends, so that a name is next to its line.
        handles, names = axes.get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda index: -lines[names[index]][-1][1])
        axes.legend(
            [handles[index] for index in order],
            [names[index] for index in order],
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            frameon=False,
        )
        chart = as_svg(figure)
    return chart.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
