"""Success against locality over an edit's strength, as a picture. Needs matplotlib (``remend[plots]``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from remend.errors import ConfigError, FileError
from remend.evaluation.report import Report

FORMATS = (".pdf", ".png", ".svg")
LABELLED = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Strengths that are named beside their points; others would be written over each other."""


def check_plot(path: Path) -> None:
    """Refuse, before the work is done, a picture that could not be drawn afterwards.

    Raises:
        ConfigError: matplotlib is not installed, or the file's ending names no format.
        FileError: the folder to write to does not exist.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: a picture's name ends with {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: pip install 'remend[plots]', or leave --plot away")
    if not path.parent.is_dir():
        raise FileError(f"{path.parent} is no folder: make it first, or write elsewhere")


def draw_frontier(reports: Mapping[str, Report], path: Path) -> None:
    """Draw generality against near locality over the edits' scale, one line for each report, and save the picture.

    Args:
        reports: by the name that the legend shows; each with a frontier.
        path: where to; its ending names the format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 5), layout="constrained")
    lowest = 1.0
    for name, report in reports.items():
        at = {
            scale: {metric: modes["generated"].mean for metric, modes in own.items() if "generated" in modes}
            for scale, own in report.frontier_metrics().items()
        }
        success = "generality" if "generality" in at[1.0] else "reliability"
        if "locality_near" not in at[1.0]:
            raise ConfigError("the requests have no near probes: there is no near locality to draw")
        near = [1.0, *(own["locality_near"] for own in at.values())]  # at scale 0 everything is as it was
        gained = [0.0, *(own[success] for own in at.values())]
        (line,) = axes.plot(near, gained, marker="o", markersize=3.5, linewidth=1.4, label=f"{name}: {success}")
        axes.plot(at[1.0]["locality_near"], at[1.0][success], marker="o", markersize=9, color=line.get_color())
        for scale in LABELLED:
            if scale in at:
                place = (at[scale]["locality_near"], at[scale][success])
                axes.annotate(
                    f"{scale:g}×", place, textcoords="offset points", xytext=(-8, -10), fontsize=7, ha="right"
                )
        lowest = min(lowest, *near)
    axes.set(xlabel="near locality: answers of near prompts that stay", ylabel="success: paraphrases that follow")
    edge = max(0.0, lowest - 0.1)
    axes.set(xlim=(edge, 1.02), ylim=(-0.06, 1.03), title="Edits at 0 to 2 times their strength (large: as made)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
