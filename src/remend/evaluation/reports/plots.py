"""An evaluation as pictures. Needs matplotlib (``remend[plots]``), which is imported when something is drawn."""

from __future__ import annotations

import importlib.util
import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remend.errors import ConfigError, FileError
from remend.evaluation.reports.comparison import Difference
from remend.evaluation.reports.report import Case, Report, Summary, metrics_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".pdf", ".png", ".svg")
LABELLED = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Strengths that are named beside their points; others would be written over each other."""
INK = "#1f2328"
"""What text and axes are drawn with; a page replaces it by its own colour of text."""
COLOURS = ("#3b7dd8", "#e07b39", "#3f9d6b", "#b05fc0", "#c9485b", "#8a8f98")
MOST_GROUPS = 24
BINS = 5


def check_plot(path: Path) -> None:
    """Refuse, before the work is done, a picture that could not be drawn afterwards.

    Raises:
        ConfigError: matplotlib is not installed, or the file's ending names no format.
        FileError: the folder to write to does not exist.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: a picture's name ends with {', '.join(FORMATS)}")
    check_matplotlib()
    if not path.parent.is_dir():
        raise FileError(f"{path.parent} is no folder: make it first, or write elsewhere")


def check_matplotlib() -> None:
    """Refuse, before the work is done, what could not be drawn afterwards.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: pip install 'remend[plots]', or leave the pictures away")


def pictures(report: Report) -> dict[str, Callable[[], Figure]]:
    """What can be drawn of a report, by name: only what it has data for."""
    found: dict[str, Callable[[], Figure]] = {}
    names = report.metrics().keys()
    if len(report.cases) > 1:
        found["distance"] = lambda: distance(report)
        found["distributions"] = lambda: distributions(report)
    for by in ("relation", "target_tokens", "confidence"):
        if len(groups(report.cases, by)) > 1:
            found[by] = lambda by=by: breakdown(report, by)  # type: ignore[misc]
    if report.frontier and "locality_near" in names:
        found["frontier"] = lambda: frontier({report.editor or "edits": report})
    if len(report.runs) > 1:
        found["growth"] = lambda: growth(report)
    if report.retention():
        found["retention"] = lambda: retention(report)
    return found


def save(figure: Figure, path: Path) -> None:
    """Write a picture; the file's ending names the format."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_all(report: Report, folder: Path) -> list[str]:
    """Write all pictures of a report into a folder, each as PNG and SVG, and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures(report)
    for name, draw in drawn.items():
        for suffix in (".png", ".svg"):
            save(draw(), folder / f"{name}{suffix}")
    return list(drawn)


def svg(figure: Figure) -> str:
    """A picture as part of a page: it takes the page's colour and font, and no more width than there is."""
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :].replace(INK, "currentColor")


@contextmanager
def _axes(name: str, width: float = 6.4, height: float = 4.0) -> Iterator[tuple[Figure, Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: Any = {
        **dict.fromkeys(inks, INK),
        "svg.fonttype": "none",
        "legend.frameon": False,
        "svg.hashsalt": name,
        "font.size": 9,
    }
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": cycler(color=COLOURS)}
    with mpl.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        yield figure, axes


def frontier(reports: Mapping[str, Report]) -> Figure:
    """Generality against near locality over the edits' strength, one line for each report.

    Args:
        reports: by the name that the legend shows; each with a frontier.

    Raises:
        ConfigError: a report has no near locality.
    """
    with _axes("frontier", 6.4, 5) as (figure, axes):
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
        axes.set(xlim=(max(0.0, lowest - 0.1), 1.02), ylim=(-0.06, 1.03))
        axes.set_title("Edits at 0 to 2 times their strength (large: as made)")
        axes.legend(loc="lower left", fontsize=8)
    return figure


def distance(report: Report) -> Figure:
    """Answers that stay, from the nearest prompts to the farthest, beside what the fact in the prompt does."""
    told = {"edited": report.metrics()}
    if "in_context" in report.baselines:
        told["fact in the prompt"] = report.beside(report.runs[-1])["in_context"]
    names = [name for name in told["edited"] if name.startswith("locality_near_")]
    names = sorted(names, key=lambda name: -told["edited"][name.replace("locality", "kl")]["value"].mean)
    names += [f"locality_{kind}" for kind in ("near", "adversarial", "far") if f"locality_{kind}" in told["edited"]]
    with _axes("distance", 6.4, 1.2 + 0.42 * len(names)) as (figure, axes):
        for number, (name, own) in enumerate(told.items()):
            points = [own.get(metric, {}).get("generated") for metric in names]
            _intervals(axes, points, name, 0.16 * number - 0.08 * (len(told) - 1))
        labels = [name.removeprefix("locality_").replace("_", " ").removeprefix("near ") for name in names]
        axes.set_yticks(range(len(names)), labels)
        axes.invert_yaxis()
        axes.set(xlim=(-0.02, 1.02), xlabel="share of answers that stay, with 95 % intervals")
        axes.set_title("Locality, from the prompts that edits disturb most to the farthest")
        axes.legend(fontsize=8)
    return figure


def distributions(report: Report) -> Figure:
    """How many edits did how well: means hide whether all are a little bad or a few are useless."""
    shown = [name for name in ("edit_success", "locality_near", "locality_far") if name in report.metrics()]
    with _axes("distributions") as (figure, axes):
        edges = [step / 10 for step in range(11)]
        width = 0.09 / max(1, len(shown))
        for number, name in enumerate(shown):
            values = [case.values[name]["generated"] for case in report.cases if name in case.values]
            counts = [0] * 11
            for value in values:
                counts[round(10 * value)] += 1
            places = [edge + width * (number - (len(shown) - 1) / 2) for edge in edges]
            heights = [count / len(values) for count in counts]
            axes.bar(places, heights, width, label=name.replace("_", " "))
        axes.set(
            xlabel="share of an edit's prompts, generated, to the nearest tenth",
            ylabel="share of edits",
            ylim=(0, 1.02),
        )
        axes.set_xticks(edges)
        axes.set_title("Edits by how many of their prompts came out right")
        axes.legend(fontsize=8)
    return figure


def groups(cases: Sequence[Case], by: str) -> dict[str, list[Case]]:
    """The cases by what their request says of ``by``; numbers in ranges with about as many cases each."""
    having = [case for case in cases if by in case.about]
    if by == "relation":
        named: dict[str, list[Case]] = defaultdict(list)
        for case in having:
            named[str(case.about[by])].append(case)
        common = sorted(named.items(), key=lambda item: (-len(item[1]), item[0]))[:MOST_GROUPS]
        return {f"{name} ({len(own)})": own for name, own in common}
    ordered = sorted(having, key=lambda case: float(case.about[by]))
    found: dict[str, list[Case]] = {}
    start = 0
    for part in range(BINS):
        end = max(start, round(len(ordered) * (part + 1) / BINS))
        while 0 < end < len(ordered) and ordered[end].about[by] == ordered[end - 1].about[by]:
            end += 1  # equal values stay together
        own = ordered[start:end]
        if own:
            low, high = (float(case.about[by]) for case in (own[0], own[-1]))
            names = dict.fromkeys((f"{low:.3g}", f"{high:.3g}"))
            found.setdefault("–".join(names), []).extend(own)  # ranges that are written alike are one
        start = end
    return {f"{name} ({len(own)})": own for name, own in found.items()}


WORDS = {
    "relation": "relation",
    "target_tokens": "tokens of the target",
    "confidence": "probability of the unedited model's own answer",
}


def breakdown(report: Report, by: str) -> Figure:
    """Success and near locality for each relation, target length or confidence of the base model."""
    found = groups(report.cases, by)
    told = {name: metrics_of(own) for name, own in found.items()}
    with _axes(by, 6.4, 1.4 + 0.3 * len(found)) as (figure, axes):
        shown = [name for name in ("edit_success", "locality_near") if name in report.metrics()]
        for number, metric in enumerate(shown):
            points = [own.get(metric, {}).get("generated") for own in told.values()]
            _intervals(axes, points, metric.replace("_", " "), 0.2 * number - 0.1)
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        axes.set(xlim=(-0.02, 1.02), xlabel="generated, with 95 % intervals")
        axes.set_title(f"By {WORDS[by]} (how many edits)")
        axes.legend(fontsize=8)
    return figure


def growth(report: Report) -> Figure:
    """What becomes of success and locality as more edits are at work."""
    with _axes("growth") as (figure, axes):
        told = [run.metrics() for run in report.runs]
        for name in ("reliability", "edit_success", "locality_far", "locality_near"):
            if name in told[0]:
                counts = [run.edits for run in report.runs]
                points = [own[name]["generated"] for own in told]
                (line,) = axes.plot(counts, [p.mean for p in points], marker="o", label=name.replace("_", " "))
                low, high = ([p.ci95[side] for p in points] for side in (0, 1))
                axes.fill_between(counts, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="edits at work", ylabel="generated, with 95 % intervals")
        axes.set_xticks([run.edits for run in report.runs], [str(run.edits) for run in report.runs])
        axes.minorticks_off()
        axes.set_title(f"{report.protocol.capitalize()} edits")
        axes.legend(fontsize=8)
    return figure


def retention(report: Report) -> Figure:
    """Whether edit i is still there after edit j: light where its own prompt is still answered with its target."""
    rows = report.retention()
    made = len(rows[-1])
    columns = min(made, 200)
    shares = []
    for row in rows:
        cells: list[float] = []
        for column in range(columns):
            own = row[column * made // columns : (column + 1) * made // columns]
            cells.append(sum(own) / len(own) if own else float("nan"))
        shares.append(cells)
    with _axes("retention", 6.4, 1.6 + 0.35 * len(rows)) as (figure, axes):
        image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=(0, made, len(rows), 0))
        axes.set_yticks([place + 0.5 for place in range(len(rows))], [str(run.edits) for run in report.runs])
        axes.set(xlabel="edit, in the order in which they were made", ylabel="after so many edits")
        axes.grid(visible=False)
        axes.set_title("Retention: is an edit still there?")
        figure.colorbar(image, label="share of own prompts answered")
    return figure


def differences(found: Mapping[str, Sequence[Difference]], mode: str = "generated") -> Figure:
    """How each report differs from the first, metric by metric."""
    names = list(dict.fromkeys(own.metric for several in found.values() for own in several if own.mode == mode))
    with _axes("differences", 6.4, 1.4 + 0.36 * len(names)) as (figure, axes):
        for number, (label, several) in enumerate(found.items()):
            by_name = {own.metric: own.difference for own in several if own.mode == mode}
            _intervals(axes, [by_name.get(name) for name in names], label, 0.16 * number - 0.08 * (len(found) - 1))
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.invert_yaxis()
        axes.set(xlabel=f"difference from the first report, {mode}, with 95 % intervals (paired bootstrap)")
        axes.legend(fontsize=8)
    return figure


def _intervals(axes: Any, points: Sequence[Summary | None], label: str, offset: float) -> None:
    """One point with its interval a row; what was not measured is left out."""
    there = [(place + offset, point) for place, point in enumerate(points) if point is not None]
    means = [point.mean for _, point in there]
    errors = [[p.mean - p.ci95[0] for _, p in there], [p.ci95[1] - p.mean for _, p in there]]
    errors = [[max(0.0, error) for error in side] for side in errors]
    axes.errorbar(means, [place for place, _ in there], xerr=errors, fmt="o", markersize=4, capsize=2, label=label)
