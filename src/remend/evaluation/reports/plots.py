"""Plots of an evaluation: frontier, locality by distance, distributions, breakdowns, growth, retention, differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from remend.errors import ConfigError
from remend.evaluation.reports.comparison import MetricDifference
from remend.evaluation.reports.figure_style import INK, draw_intervals, new_axes, save_figure
from remend.evaluation.reports.metric_titles import title_of
from remend.evaluation.reports.report import Case, Report, metrics_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELLED_STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Strengths that are written beside their points; more labels would overlap."""
BREAKDOWNS = {
    "relation": "relation",
    "target_tokens": "tokens of the target",
    "confidence": "probability of the unedited model's own answer",
}
"""Properties of a case by which results are broken down, with their titles."""
MAX_RELATIONS = 24
"""Relations of a breakdown, the most common ones."""
NUMBER_BINS = 5
"""Ranges of a breakdown by a number."""


def available_plots(report: Report) -> dict[str, Callable[[], Figure]]:
    """Return the functions that draw the plots which a report has data for, by name."""
    plots: dict[str, Callable[[], Figure]] = {}
    names = report.metrics().keys()
    if len(report.cases) > 1:
        plots["distance"] = lambda: distance(report)
        plots["distributions"] = lambda: distributions(report)
    for by in BREAKDOWNS:
        if len(groups(report.cases, by)) > 1:
            plots[by] = partial(breakdown, report, by)
    if report.frontier and "locality_near" in names:
        plots["frontier"] = lambda: frontier({report.editor or "edits": report})
    if len(report.runs) > 1:
        plots["growth"] = lambda: growth(report)
    if len(report.runs) > 1 and report.runs[0].abilities:
        plots["abilities"] = lambda: abilities(report)
    if report.retention():
        plots["retention"] = lambda: retention(report)
    return plots


def save_plots(report: Report, folder: Path) -> list[str]:
    """Write all plots of a report into a folder, each as PNG and SVG, and return their names.

    Raises:
        FileError: they cannot be written.
    """
    plots = available_plots(report)
    for name, draw in plots.items():
        for suffix in (".png", ".svg"):
            save_figure(draw(), folder / f"{name}{suffix}")
    return list(plots)


def frontier(reports: Mapping[str, Report]) -> Figure:
    """Draw generality against near locality over the edits' strength, one line for each report.

    Args:
        reports: by the name that the legend shows; each with a frontier.

    Raises:
        ConfigError: a report has no near locality.
    """
    with new_axes("frontier", 6.4, 5) as (figure, axes):
        lowest = 1.0
        for name, report in reports.items():
            means = {
                strength: {name: modes["generated"].mean for name, modes in metrics.items() if "generated" in modes}
                for strength, metrics in report.frontier_metrics().items()
            }
            success = "generality" if "generality" in means[1.0] else "reliability"
            if "locality_near" not in means[1.0]:
                raise ConfigError("the frontier shows near locality, but the requests have no near probes: give some")
            # The curve begins at strength 0, where nothing has changed.
            near = [1.0, *(metrics["locality_near"] for metrics in means.values())]
            successes = [0.0, *(metrics[success] for metrics in means.values())]
            label = f"{name}: {title_of(success)}"
            (line,) = axes.plot(near, successes, marker="o", markersize=3.5, linewidth=1.4, label=label)
            as_made = (means[1.0]["locality_near"], means[1.0][success])
            axes.plot(*as_made, marker="o", markersize=9, color=line.get_color())
            for strength in LABELLED_STRENGTHS:
                if strength in means:
                    point = (means[strength]["locality_near"], means[strength][success])
                    axes.annotate(
                        f"{strength:g}×", point, textcoords="offset points", xytext=(-8, -10), fontsize=7, ha="right"
                    )
            lowest = min(lowest, *near)
        axes.set(xlabel="near locality: answers of near prompts that stay", ylabel="success: paraphrases that follow")
        axes.set(xlim=(max(0.0, lowest - 0.1), 1.02), ylim=(-0.06, 1.03))
        axes.set_title("Edits at 0 to 2 times their strength (large: as made)")
        axes.legend(loc="lower left", fontsize=8)
    return figure


def distance(report: Report) -> Figure:
    """Draw the share of answers that stay, from the nearest prompts to the farthest, with and without the edits."""
    edited = report.metrics()
    series = {"edited": edited}
    if "in_context" in report.baselines:
        series["fact in the prompt"] = report.baseline_metrics(report.runs[-1])["in_context"]
    # The nearest kind of prompt is the one that edits disturb most.
    names = [name for name in edited if name.startswith("locality_near_")]
    names = sorted(names, key=lambda name: -edited[name.replace("locality", "kl")]["value"].mean)
    names += [name for name in ("locality_near", "locality_adversarial", "locality_far") if name in edited]
    with new_axes("distance", 6.4, 1.2 + 0.42 * len(names)) as (figure, axes):
        for number, (label, metrics) in enumerate(series.items()):
            points = [metrics.get(name, {}).get("generated") for name in names]
            draw_intervals(axes, points, label, 0.16 * number - 0.08 * (len(series) - 1))
        labels = [title_of(name).removeprefix("locality ").removeprefix("near ") for name in names]
        axes.set_yticks(range(len(names)), labels)
        axes.invert_yaxis()
        axes.set(xlim=(-0.02, 1.02), xlabel="share of answers that stay, with 95 % intervals")
        axes.set_title("Locality, from the prompts that edits disturb most to the farthest")
        axes.legend(fontsize=8)
    return figure


def distributions(report: Report) -> Figure:
    """Draw how many edits did how well: a mean does not tell whether all are a little bad or a few are useless."""
    shown = [name for name in ("edit_success", "locality_near", "locality_far") if name in report.metrics()]
    with new_axes("distributions") as (figure, axes):
        edges = [step / 10 for step in range(11)]
        width = 0.09 / max(1, len(shown))
        for number, name in enumerate(shown):
            values = [case.values[name]["generated"] for case in report.cases if name in case.values]
            counts = [0] * 11
            for value in values:
                counts[round(10 * value)] += 1
            positions = [edge + width * (number - (len(shown) - 1) / 2) for edge in edges]
            heights = [count / len(values) for count in counts]
            axes.bar(positions, heights, width, label=title_of(name))
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
    """Group the cases by a property of their requests: numbers in ranges with about as many cases each.

    Args:
        cases: the cases; those without the property are left out.
        by: a key of :data:`BREAKDOWNS`.
    """
    cases = [case for case in cases if by in case.about]
    if by == "relation":
        named: dict[str, list[Case]] = defaultdict(list)
        for case in cases:
            named[str(case.about[by])].append(case)
        common = sorted(named.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_RELATIONS]
        return {f"{name} ({len(group)})": group for name, group in common}
    ordered = sorted(cases, key=lambda case: float(case.about[by]))
    ranges: dict[str, list[Case]] = {}
    start = 0
    for number in range(NUMBER_BINS):
        end = max(start, round(len(ordered) * (number + 1) / NUMBER_BINS))
        while 0 < end < len(ordered) and ordered[end].about[by] == ordered[end - 1].about[by]:
            end += 1  # equal values stay together
        group = ordered[start:end]
        if group:
            low, high = (float(case.about[by]) for case in (group[0], group[-1]))
            ends = dict.fromkeys((f"{low:.3g}", f"{high:.3g}"))
            # Ranges that are written alike after rounding become one.
            ranges.setdefault("–".join(ends), []).extend(group)
        start = end
    return {f"{name} ({len(group)})": group for name, group in ranges.items()}


def breakdown(report: Report, by: str) -> Figure:
    """Draw success and near locality for each group of cases (:func:`groups`)."""
    grouped = {label: metrics_of(cases) for label, cases in groups(report.cases, by).items()}
    with new_axes(by, 6.4, 1.4 + 0.3 * len(grouped)) as (figure, axes):
        shown = [name for name in ("edit_success", "locality_near") if name in report.metrics()]
        for number, metric in enumerate(shown):
            points = [metrics.get(metric, {}).get("generated") for metrics in grouped.values()]
            draw_intervals(axes, points, title_of(metric), 0.2 * number - 0.1)
        axes.set_yticks(range(len(grouped)), list(grouped))
        axes.invert_yaxis()
        axes.set(xlim=(-0.02, 1.02), xlabel="generated, with 95 % intervals")
        axes.set_title(f"By {BREAKDOWNS[by]} (how many edits)")
        axes.legend(fontsize=8)
    return figure


def growth(report: Report) -> Figure:
    """Draw success and locality against the number of edits that are applied."""
    with new_axes("growth") as (figure, axes):
        by_run = [run.metrics() for run in report.runs]
        for name in ("reliability", "edit_success", "locality_far", "locality_near"):
            if name in by_run[0]:
                counts = [run.edits for run in report.runs]
                points = [metrics[name]["generated"] for metrics in by_run]
                (line,) = axes.plot(counts, [p.mean for p in points], marker="o", label=title_of(name))
                low, high = ([p.ci95[side] for p in points] for side in (0, 1))
                axes.fill_between(counts, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="edits at work", ylabel="generated, with 95 % intervals")
        axes.set_xticks([run.edits for run in report.runs], [str(run.edits) for run in report.runs])
        axes.minorticks_off()
        axes.set_title(f"{report.protocol.capitalize()} edits")
        axes.legend(fontsize=8)
    return figure


def abilities(report: Report) -> Figure:
    """Draw how much of what the unedited model gets right stays right, by the number of edits at work."""
    counts = [0, *(run.edits for run in report.runs)]
    with new_axes("abilities") as (figure, axes):
        for name in report.runs[0].abilities:
            points = [run.abilities[name] for run in report.runs]
            (line,) = axes.plot(counts, [1.0, *(p.mean for p in points)], marker="o", label=name.replace("_", " "))
            low, high = ([1.0, *(p.ci95[side] for p in points)] for side in (0, 1))
            axes.fill_between(counts, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(ylim=(-0.02, 1.02), xlabel="edits at work", ylabel="still right, with 95 % intervals")
        axes.set_title("Abilities: is what the unedited model gets right still right?")
        axes.legend(fontsize=8)
    return figure


def retention(report: Report) -> Figure:
    """Draw whether edit i is retained after edit j: light where its prompt is still answered with its target."""
    rows = report.retention()
    edits = len(rows[-1])
    columns = min(edits, 200)  # more would be narrower than a pixel
    shares = []
    for row in rows:
        cells: list[float] = []
        for column in range(columns):
            values = row[column * edits // columns : (column + 1) * edits // columns]
            cells.append(sum(values) / len(values) if values else float("nan"))
        shares.append(cells)
    with new_axes("retention", 6.4, 1.6 + 0.35 * len(rows)) as (figure, axes):
        image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=(0, edits, len(rows), 0))
        axes.set_yticks([index + 0.5 for index in range(len(rows))], [str(run.edits) for run in report.runs])
        axes.set(xlabel="edit, in the order in which they were made", ylabel="after so many edits")
        axes.grid(visible=False)
        axes.set_title("Retention: is an edit still effective?")
        figure.colorbar(image, label="share of own prompts answered")
    return figure


def differences(reports: Mapping[str, Sequence[MetricDifference]], mode: str = "generated") -> Figure:
    """Draw how each report differs from the first, metric by metric."""
    listed = [difference for of_report in reports.values() for difference in of_report if difference.mode == mode]
    names = list(dict.fromkeys(difference.metric for difference in listed))
    with new_axes("differences", 6.4, 1.4 + 0.36 * len(names)) as (figure, axes):
        for number, (label, of_report) in enumerate(reports.items()):
            by_name = {each.metric: each.difference for each in of_report if each.mode == mode}
            offset = 0.16 * number - 0.08 * (len(reports) - 1)
            draw_intervals(axes, [by_name.get(name) for name in names], label, offset)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), [title_of(name) for name in names])
        axes.invert_yaxis()
        axes.set(xlabel=f"difference from the first report, {mode}, with 95 % intervals (paired bootstrap)")
        axes.legend(fontsize=8)
    return figure
