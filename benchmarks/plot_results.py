"""Plot the results of the benchmarks from their JSON files.

    python benchmarks/plot_results.py [--results benchmarks/results] [--out benchmarks/plots]

Needs matplotlib: ``pip install 'remend[plots]'``. Results that are missing are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

HERE = Path(__file__).parent
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}
BLUE, ORANGE, GRAY, BLACK, LIGHT_GRAY = "#2b6ca3", "#d9822b", "#8a8f98", "#22262b", "#c9ccd1"
OTHER_LINES = "other lines of the table"
# The base model's stages are blue, the editor's orange, and the others gray.
STAGE_COLORS = {
    "prefix": "#14395c",
    "inner pass": "#2b6ca3",
    "base logits": "#4f90c4",
    "edited forward": "#86b6dd",
    "edited backward": "#b9d6ee",
    "editor forward": "#a3570f",
    "editor backward": "#d9822b",
    "weight gradients": "#f2b577",
    "Adam": "#8a8f98",
    "rest": "#cfd3d8",
}


def training_speed(result: Mapping[str, Any]) -> Figure:
    """Plot the stages of a step as stacked bars with the floor marked, and peak memory beside them."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2.7, 1))
    bars = [(row, name) for row in result["results"] for name in ("first", "warm")]
    heights = [-index - 0.5 * (index // 2) for index in range(len(bars))]
    for height, (row, name) in zip(heights, bars, strict=True):
        start, epoch = 0.0, row[name]
        for stage, color in STAGE_COLORS.items():
            width = 1000 * epoch["stages"][stage]
            left.barh(height, width, 0.8, start, color=color)
            if height == heights[0] and width > 0:
                left.text(start + width / 2, height + 0.5, stage, rotation=35, ha="left", va="bottom", fontsize=8)
            start += width
        floor = 1000 * epoch["floor_seconds_per_episode"]
        left.plot([floor, floor], [height - 0.45, height + 0.45], color=BLACK, linewidth=2)
        text = f" {1000 * epoch['seconds_per_episode']:.0f} ms, {epoch['ratio']:.2f} × its floor"
        left.text(start, height, text, va="center")
    labels = [f"batch of {row['batch_size']}, {'new' if name == 'first' else 'seen'} examples" for row, name in bars]
    left.set_yticks(heights, labels)
    left.set_xlim(0, 1.3 * max(1000 * sum(row[name]["stages"].values()) for row, name in bars))
    left.set_ylim(heights[-1] - 0.7, 3.1)
    left.set_xlabel("CPU milliseconds an episode (black mark: the matrix products alone)")
    reference = result["reference"]
    slower = max(reference["times_slower_than"].values())
    left.set_title(
        f"Time of an episode (the paper written literally: {reference['seconds_per_episode']:.1f} s, {slower:.0f} ×)"
    )
    plot_memory(right, result["results"])
    return figure


def plot_memory(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """Plot peak memory at each batch size: libraries, model, editor with Adam, and the rest."""
    parts = {"libraries": GRAY, "base model": BLUE, "editor, Adam": ORANGE, "all else": "#cfd3d8"}
    for index, row in enumerate(results):
        memory = row["memory"]
        sizes = [memory[key] for key in ("libraries_bytes", "model_bytes", "editor_and_adam_bytes")]
        bottom = 0.0
        for (label, color), size in zip(parts.items(), [*sizes, memory["peak_bytes"] - sum(sizes)], strict=True):
            axes.bar(index, size / 1e9, 0.7, bottom, color=color)
            if index == len(results) - 1:
                axes.text(index + 0.4, bottom + size / 2e9, label, va="center")
            bottom += size / 1e9
        axes.text(index, bottom, f"{bottom:.2f}", ha="center", va="bottom")
    axes.set_xticks(range(len(results)), [str(row["batch_size"]) for row in results])
    axes.set_xlim(-0.5, len(results) + 0.7)
    axes.set_xlabel("batch size")
    axes.set_title("Peak memory, GB")


SIZE_TITLES = {
    "batch_size": "episodes a step",
    "n_embd": "width of the model",
    "n_layer": "blocks of the model",
    "edited_blocks": "blocks that are edited",
    "rank": "rank of the editor networks",
}


def scaling(result: Mapping[str, Any]) -> Figure:
    """Plot one column for each size, with time above and memory below; each row has one scale."""
    sweeps = result["sweeps"]
    figure, rows = pyplot.subplots(2, len(sweeps), figsize=(12, 4.8), sharey="row", squeeze=False)
    for column, (name, points) in enumerate(sweeps.items()):
        top, bottom = rows[0][column], rows[1][column]
        x = [point[name] for point in points]
        for key, color, label in (
            ("seconds_per_episode", BLUE, "new examples"),
            ("warm_seconds_per_episode", ORANGE, "seen before"),
        ):
            y = [1000 * point[key] for point in points]
            top.plot(x, y, "o-", color=color, markersize=4)
            if column == 0:
                above = key == "seconds_per_episode"
                top.annotate(
                    label,
                    (x[-1], y[-1]),
                    (0, 6 if above else -6),
                    textcoords="offset points",
                    color=color,
                    ha="right",
                    va="bottom" if above else "top",
                )
        bottom.plot(x, [(point["peak_bytes"] or 0) / 1e9 for point in points], "o-", color=BLACK, markersize=4)
        for axes in (top, bottom):
            axes.axvline(result["config"]["centre"][name], color=GRAY, linewidth=0.8, linestyle=":")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        bottom.set_xlabel(SIZE_TITLES[name])
    for row in rows:
        row[0].set_ylim(bottom=0)  # after all lines are drawn, because it turns autoscaling off
    rows[0][0].set_ylabel("CPU ms an episode")
    rows[1][0].set_ylabel("peak memory, GB")
    centre = ", ".join(f"{SIZE_TITLES[name]} {value}" for name, value in result["config"]["centre"].items())
    figure.suptitle(f"One size at a time; dotted, the centre: {centre}", x=0.01, ha="left", fontsize=10)
    return figure


def prefix_cache(result: Mapping[str, Any]) -> Figure:
    """Plot one bar for each variant of the cache."""
    figure, axes = pyplot.subplots(figsize=(7.5, 2.6))
    rows = result["results"]
    for index, row in enumerate(rows):
        size = row["memory_bytes"] or row["disk_bytes"]
        size_text = f", {size / 1e6:.0f} MB {'on disk' if row['disk_bytes'] else 'in memory'}" if size else ""
        milliseconds = 1000 * row["seconds_per_episode"]
        axes.barh(-index, milliseconds, 0.75, color=BLUE if index else GRAY)
        axes.text(milliseconds, -index, f" {milliseconds:.0f} ms, {row['ratio']:.2f} ×{size_text}", va="center")
    axes.set_yticks([-index for index in range(len(rows))], [row["kept"] for row in rows])
    axes.set_xlim(0, 1.45 * max(1000 * row["seconds_per_episode"] for row in rows))
    axes.set_xlabel("CPU milliseconds an episode")
    model, requests = result["config"]["model"], result["config"]["requests"]
    axes.set_title(f"Later epochs over {requests} requests, {model['n_layer']} blocks: what is kept from earlier ones")
    return figure


def time_to_quality(result: Mapping[str, Any]) -> Figure:
    """Plot the two curves of every run over CPU seconds."""
    figure, columns = pyplot.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    goal = result["config"]["goal"]
    names = [line["name"] for line in result["config"]["lines"]]
    colors = dict(zip(names, (BLUE, GRAY, ORANGE, BLACK), strict=False))
    titles = {
        "taken": "Edits whose neighbour is answered in full",
        "kept": "Unrelated examples that keep their first choices",
    }
    for axes, (key, title) in zip(columns, titles.items(), strict=True):
        for run in result["runs"]:
            curve = run["curve"]
            x, y = [entry["seconds"] for entry in curve], [entry[key] for entry in curve]
            axes.plot(x, y, color=colors[run["name"]], linewidth=1.2, alpha=0.85)
        for name in {run["name"] for run in result["runs"]}:
            last = [run["curve"][-1] for run in result["runs"] if run["name"] == name]
            mean = sum(entry[key] for entry in last) / len(last)
            if key == "taken":
                axes.text(1.03 * max(entry["seconds"] for entry in last), mean, name, color=colors[name], va="center")
        axes.axhline(goal[key], color=BLACK, linewidth=0.8, linestyle=":")
        axes.text(0.01, goal[key], f" goal {goal[key]:.0%}", transform=axes.get_yaxis_transform(), va="bottom")
        axes.set_xscale("log")
        axes.set_ylim(top=1 + 0.02 * (1 - axes.get_ylim()[0]))
        seconds = [entry["seconds"] for run in result["runs"] for entry in run["curve"]]
        axes.set_xlim(0.9 * min(seconds), 1.7 * max(seconds))
        ticks = [
            tick for tick in (10, 20, 30, 50, 100, 200, 500, 1000, 2000) if min(seconds) < tick < 1.5 * max(seconds)
        ]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1 if axes.get_ylim()[0] > 0.9 else 0))
        axes.set_xlabel("CPU seconds of training, calibration included")
        axes.set_title(f"{title}; one line a seed")
    return figure


def kill_and_resume(result: Mapping[str, Any]) -> Figure:
    """Plot each killed session: the step at which it started, and its last checkpoint."""
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    column, chain_starts = 0, []
    for chain in result["chains"]:
        chain_starts.append(column)
        for kill in chain["kills"]:
            start, end = kill["began_at_step"] or 0, kill["checkpoint_left"] or 0
            axes.plot([column, column], [start, end], color=BLUE, linewidth=5, solid_capstyle="butt")
            axes.plot(column, end, "x", color=ORANGE, markersize=6)
            text = f"{kill['killed_after_seconds']:.0f} s"
            axes.annotate(text, (column, end), (0, 5), textcoords="offset points", ha="center", fontsize=7)
            column += 1
    for start in chain_starts[1:]:
        axes.axvline(start - 0.5, color=GRAY, linewidth=0.8)
    axes.set_xticks([])
    axes.set_xlabel(
        f"sessions that were killed, in {len(result['chains'])} chains that then ran to their end; "
        "×: last checkpoint, with the seconds until the kill"
    )
    axes.set_ylabel("step")
    axes.set_ylim(0, 1.12 * result["config"]["options"]["max_steps"])
    verdict = "every editor equal, bit for bit," if result["all_equal"] else "NOT every editor equal"
    axes.set_title(f"{result['kills']} kills: {verdict} to the uninterrupted run's")
    return figure


def gpu(result: Mapping[str, Any]) -> Figure | None:
    """Plot episodes a second of each model; return None if no GPU was measured."""
    rows = [row for row in result["results"] if row["status"] == "measured"]
    if not result["measured"] or not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.7 * len(rows)))
    for index, row in enumerate(rows):
        for offset, key, color, label in (
            (0.2, "episodes_per_second", BLUE, "new examples"),
            (-0.2, "warm_episodes_per_second", ORANGE, "seen before"),
        ):
            axes.barh(-index + offset, row[key], 0.38, color=color)
            axes.text(row[key], -index + offset, f" {row[key]:.3g}, {label}", va="center", fontsize=8)
    labels = [f"{row['name']}\n{row['peak_bytes'] / 1e9:.1f} GB" for row in rows]
    axes.set_yticks([-index for index in range(len(rows))], labels)
    axes.set_xlim(0, 1.35 * max(row["warm_episodes_per_second"] for row in rows))
    axes.set_xlabel("episodes a second")
    axes.set_title(f"Training on {result['environment']['device']}")
    return figure


def frontier(result: Mapping[str, Any]) -> Figure | None:
    """Plot generality against near locality over the edits' scale, one line for each way of training."""
    lines = {line["name"]: line for line in result["config"]["lines"]}
    titles = {name: line["title"].strip("*… ") for name, line in lines.items()}
    highlighted = [name for name, line in lines.items() if line.get("drawn")]
    colors = {
        "default": BLACK,
        "mend": ORANGE,
        **dict(zip(highlighted, pyplot.colormaps["tab10"].colors[2:], strict=False)),
    }
    measured = {run["testbed"] for run in result["runs"]}
    testbeds = [testbed for testbed in result["config"]["testbeds"] if testbed["name"] in measured]
    if not testbeds:
        return None
    figure, grid = pyplot.subplots(len(testbeds), 2, figsize=(12, 5.2 * len(testbeds)), squeeze=False, sharex=True)
    for axes, (testbed, split) in zip(grid.flat, itertools.product(testbeds, ("validation", "test")), strict=True):
        runs = [run for run in result["runs"] if run["testbed"] == testbed["name"] and run["split"] == split]
        in_legend: set[str] = set()
        for run in runs:
            name = run["name"].removesuffix("-test")
            main_line, color = name in ("default", "mend"), colors.get(name, LIGHT_GRAY)
            # Without an edit, near locality is 1 and generality 0.
            near, generality = (
                [end, *(point[metric]["mean"] for point in run["frontier"])]
                for end, metric in ((1.0, "locality_near"), (0.0, "generality"))
            )
            width = 2.0 if main_line else 1.0 if name in colors else 0.6
            label = titles[run["name"]] if name in colors else OTHER_LINES
            legend_label = None if label in in_legend else label
            axes.plot(near, generality, color=color, linewidth=width, label=legend_label, zorder=width)
            in_legend.add(label)
            point = next(point for point in run["frontier"] if point["scale"] == 1)
            axes.plot(
                point["locality_near"]["mean"], point["generality"]["mean"], "o", color=color, markersize=3 + width
            )
        axes.set(xlim=(0.2, 1.02), ylim=(0, 1.02), title=f"{testbed['title']}, {split}")
        axes.set(xlabel="near locality", ylabel="generality (dots: at scale 1)")
        axes.grid(alpha=0.3)
        if runs:
            axes.legend(fontsize=7, loc="lower left")
    return figure


def mining(result: Mapping[str, Any]) -> Figure:
    """Plot the share of prompts that an edit disturbs over rounds of mining, for mined and for drawn ones kept."""
    figure, columns = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    titles = {"own half": "Prompts among which was looked", "other half": "Other prompts"}
    rounds = range(result["config"]["rounds"] + 1)
    for axes, (column, title) in zip(columns, titles.items(), strict=True):
        for name, color in (("drawn", GRAY), ("mined", ORANGE)):
            of_rounds = [result["results"][f"{name}, {n} rounds" if n else "none"] for n in rounds]
            shares = [row[column] for row in of_rounds]
            axes.plot(rounds, [share["mean"] for share in shares], "o-", color=color, markersize=4)
            low, high = ([share[end] for share in shares] for end in ("low", "high"))
            axes.fill_between(rounds, low, high, color=color, alpha=0.15, linewidth=0)
            kept = of_rounds[-1]["kept"]["mean"]
            text = f"{name}, {kept:.3g} kept"
            axes.annotate(
                text, (rounds[-1], shares[-1]["mean"]), (6, 0), textcoords="offset points", va="center", color=color
            )
        axes.set_xlim(-0.1, rounds[-1] + 0.9)
        axes.set_xticks(list(rounds))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("rounds")
        axes.set_title(title)
    columns[0].set_ylabel("share whose answer changes")
    return figure


PLOTS: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
    "training_speed": training_speed,
    "scaling": scaling,
    "prefix_cache": prefix_cache,
    "time_to_quality": time_to_quality,
    "kill_and_resume": kill_and_resume,
    "gpu": gpu,
    "frontier": frontier,
    "mining": mining,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Plot every result that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "plots")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in PLOTS.items():
            file = arguments.results / f"{name}.json"
            figure = draw(json.loads(file.read_text())) if file.exists() else None
            if figure is None:
                continue
            # Without matplotlib's version in the file, so that the same result gives the same file.
            figure.savefig(arguments.out / f"{name}.png", metadata={"Software": None})
            pyplot.close(figure)
            print(arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
