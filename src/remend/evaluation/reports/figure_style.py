"""Matplotlib figures in the style of reports: new axes, points with intervals, and how figures are saved.

Needs matplotlib (``remend[plots]``), which is imported when something is drawn.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remend.errors import ConfigError, FileError
from remend.saved_folders import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from remend.evaluation.summary import Summary

PLOT_SUFFIXES = (".pdf", ".png", ".svg")
INK = "#1f2328"
"""The colour of text and axes; an HTML page replaces it by its own colour of text."""
COLOURS = ("#3b7dd8", "#e07b39", "#3f9d6b", "#b05fc0", "#c9485b", "#8a8f98")


def check_plot(path: Path) -> None:
    """Check, before the work that a plot shows is done, that the plot can be written.

    Raises:
        ConfigError: matplotlib is not installed, or the file's ending names no format.
        FileError: the folder to write to does not exist.
    """
    if path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"cannot plot to {path}: the file's name should end with {', '.join(PLOT_SUFFIXES)}")
    check_matplotlib()
    if not path.parent.is_dir():
        raise FileError(f"{path.parent} is not a folder: create it, or write to another one")


def check_matplotlib() -> None:
    """Check, before the work that plots show is done, that they can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: run pip install 'remend[plots]', or omit the plots")


@contextmanager
def new_axes(name: str, width: float = 6.4, height: float = 4.0) -> Iterator[tuple[Figure, Any]]:
    """Open a figure with one pair of axes; the style holds within the ``with`` block.

    Args:
        name: the name of the plot.
        width: its width in inches.
        height: its height in inches.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # draws into files only, so that no display is needed
    from cycler import cycler
    from matplotlib import pyplot

    ink_keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: Any = {
        **dict.fromkeys(ink_keys, INK),
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 9,
        "legend.frameon": False,
        # Text stays text, so that a page can set its font and colour.
        "svg.fonttype": "none",
        # Ids within an SVG are hashes with this salt: the same plot gives the same file, and the ids of two plots on
        # a page differ.
        "svg.hashsalt": name,
    }
    with mpl.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        yield figure, axes


def draw_intervals(axes: Any, summaries: Sequence[Summary | None], label: str, offset: float) -> None:
    """Draw one point with its interval in each row; rows without a summary stay empty."""
    rows = [(index + offset, summary) for index, summary in enumerate(summaries) if summary is not None]
    means = [summary.mean for _, summary in rows]
    errors = [[s.mean - s.ci95[0] for _, s in rows], [s.ci95[1] - s.mean for _, s in rows]]
    # Rounding may put a mean of equal values just outside its interval, which matplotlib refuses.
    errors = [[max(0.0, error) for error in side] for side in errors]
    axes.errorbar(means, [y for y, _ in rows], xerr=errors, fmt="o", markersize=4, capsize=2, label=label)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure and close it; the file's ending names the format.

    Raises:
        FileError: it cannot be written.
    """
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, format=path.suffix.removeprefix(".") or None, dpi=150)
    pyplot.close(figure)
    write_bytes(path, file.getvalue())


def as_svg(figure: Figure) -> str:
    """Return a figure as an SVG element of a page, in the page's colour of text, and close it."""
    from matplotlib import pyplot

    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    content = file.getvalue()
    return content[content.index("<svg") :].replace(INK, "currentColor")
