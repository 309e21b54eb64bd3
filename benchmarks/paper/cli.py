"""The command line of the benchmark: computes cells, writes the tables, and prints which findings hold."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging

from remend.cli import options
from remend.cli.escaping import plain
from remend.cli.recipe import option_name, shell_command
from remend.errors import ConfigError, RemendError, RequestError

from . import cell_definitions, render, testbeds, training_memory
from .cell_definitions import Cell, Scale
from .methods import METHODS, SAME_TRAINING
from .render import FilledTable
from .result_folder import ResultFolder
from .results import Results
from .runner import CellRunner
from .table_definitions import TABLES
from .testbeds import TestbedOptions

MEMORY = "memory"
"""The name of Figures 3 and 4 among the tables."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command()
def paper(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where results are stored; the same folder continues a stopped run.")
    ] = Path("build/paper"),
    tables: Annotated[
        str | None, typer.Option(metavar="3,5,…", help="Of 3 (with 4), 5, 6, 9, 11 and memory, only these.")
    ] = None,
    cell: Annotated[
        str | None, typer.Option(metavar="TESTBED/METHOD/EDITS/SEED", help="Only this cell; prints its figures.")
    ] = None,
    writer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A causal language model for the generation task.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Passages that it did not learn from, for its edits.")
    ] = None,
    testbed: Annotated[
        Path | None,
        typer.Option(
            "--testbed",
            "--world",
            metavar="DIR",
            help="A model/ and its train, validation and test.jsonl: a column of Table 3.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Every cell, on less data and in minutes.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many times each cell is measured.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of every training, at most.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compute cells, on one thread each.")] = None,
    device: options.Device = "auto",
) -> None:
    """Compare editors as the paper does, on small models, and say which of its findings hold.

    Results are stored in --out and never computed again; the same command continues a run that was stopped.
    """
    names = (*TABLES, MEMORY) if tables is None else [name.strip() for name in tables.split(",")]
    if unknown := [name for name in names if name not in (*TABLES, MEMORY)]:
        raise ConfigError(f"there is no table {unknown[0]!r} here; there are {', '.join(TABLES)} and {MEMORY}")
    scale = cell_definitions.QUICK if quick else cell_definitions.FULL
    scale = replace(scale, seeds=seeds or scale.seeds, steps=steps or scale.steps)
    testbed_options = TestbedOptions(writer, text, testbed, device)
    if cell is not None:
        _refuse_options({"tables": tables, "seeds": seeds, "jobs": jobs}, "of several cells; --cell names one")
        compute_one(cell, out, scale, testbed_options)
        return
    console = Console()
    runner = _make_runner(out, scale, testbed_options)
    table_names = [name for name in names if name in TABLES]
    available = {name: bed for name, bed in runner.results.testbeds.items() if bed.available}
    cells = _in_order([cell for name in table_names for cell in TABLES[name].cells(scale, available)])
    compute_all(console, runner, cells, jobs or 1, testbed_options)
    command = _command(out, testbed_options, quick, seeds, steps)
    write_tables(console, runner.results, table_names, MEMORY in names, command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    console = Console(stderr=True)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="python -m benchmarks.paper")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except RemendError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: {plain(str(error))}", soft_wrap=True)
        return 2 if isinstance(error, RequestError | ConfigError) else 1
    return 0


def _refuse_options(values: Mapping[str, Any], reason: str) -> None:
    """Refuse options that would be ignored.

    Raises:
        ConfigError: one has a value.
    """
    if ignored := [option_name(name) for name, value in values.items() if value is not None]:
        raise ConfigError(f"{', '.join(ignored)}: {reason}")


def _make_runner(out: Path, scale: Scale, testbed_options: TestbedOptions) -> CellRunner:
    logging.disable_progress_bar()
    # The order of sums depends on the threads: figures must not depend on --jobs, nor on the number of cores.
    torch.set_num_threads(1)
    results = ResultFolder(out, testbeds.make_testbeds(testbed_options), scale)
    return CellRunner(results, testbed_options.device)


def _editor_key(cell: Cell) -> tuple[str, str, int]:
    """Return what is the same for cells that use one trained editor."""
    return cell.testbed, SAME_TRAINING.get(cell.method, cell.method), cell.seed


def _in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Return each cell once; those that use one trained editor follow each other."""
    return sorted(dict.fromkeys(cells), key=lambda cell: (*_editor_key(cell), cell.edits))


def _by_editor(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group the cells that use one trained editor, which only one process may train."""
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_editor_key(cell), []).append(cell)
    return list(groups.values())


def compute_all(
    console: Console, runner: CellRunner, cells: Sequence[Cell], jobs: int, testbed_options: TestbedOptions
) -> None:
    """Compute the cells that have no result yet, in one process or several, with a progress bar."""
    missing = [cell for cell in cells if runner.results.read(cell) is None]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("cells", total=len(cells), completed=len(cells) - len(missing))

        def done(group: Sequence[Cell]) -> None:
            bar.update(task, advance=len(group), description=group[-1].id)
            if not console.is_terminal:
                console.print(f"{group[-1].id}: done", soft_wrap=True)

        if jobs == 1:
            runner.on_progress = lambda what: bar.update(task, description=what)
            for cell in missing:
                runner.compute([cell])
                done([cell])
            return
        if any(cell.testbed == testbeds.PASSAGES for cell in missing):
            # All processes read these requests, so they are generated before the processes start.
            for split in testbeds.SPLITS:
                runner.testbed(testbeds.PASSAGES).requests(split)
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            groups = _by_editor(missing)
            folder, scale = runner.results.folder, runner.scale
            futures = [pool.submit(_compute_group, folder, scale, testbed_options, group) for group in groups]
            for future, group in zip(futures, groups, strict=True):
                future.result()
                done(group)


def _compute_group(out: Path, scale: Scale, testbed_options: TestbedOptions, cells: Sequence[Cell]) -> None:
    """Compute some cells in another process."""
    _make_runner(out, scale, testbed_options).compute(cells)


def compute_one(name: str, out: Path, scale: Scale, testbed_options: TestbedOptions) -> None:
    """Compute one cell and print its figures.

    Raises:
        ConfigError: the name is no cell's.
        RemendError: the cell failed.
    """
    cell = Cell.parse(name)
    if cell is None:
        raise ConfigError(
            f"{name!r} is no cell: it is TESTBED/METHOD/EDITS/SEED, with a method of {', '.join(METHODS)}"
        )
    runner = _make_runner(out, scale, testbed_options)
    runner.compute([cell], retry_failed=True)
    result = runner.results.read(cell)
    assert result is not None
    if "failed" in result:
        raise RemendError(f"{cell.id} failed: {result['failed']}")
    table = Table(title=plain(cell.id), title_justify="left")
    table.add_column("metric")
    table.add_column("mean", justify="right")
    table.add_column("edits", justify="right")
    for metric, figure in result["figures"].items():
        table.add_row(metric.replace("_", " "), f"{figure['mean']:.3f}", str(figure["n"]))
    Console().print(table)


def _command(
    out: Path, testbed_options: TestbedOptions, quick: bool, seeds: int | None, steps: int | None = None
) -> str:
    """Return the command that computes all this again, for the folder in which it was typed."""
    values: dict[str, Any] = {"out": out, **vars(testbed_options), "seeds": seeds, "steps": steps}
    return shell_command(["python", "-m", "benchmarks.paper", *(["--quick"] if quick else [])], values)


def write_tables(console: Console, folder: ResultFolder, names: Sequence[str], memory: bool, command: str) -> None:
    """Write the tables, and print which findings hold and which cells failed; then measure memory if it is wanted."""
    results, scale = Results(folder), folder.scale
    tables = [render.fill(TABLES[name], results, f"{command} --tables {name}") for name in names]
    machine = f"Python {platform.python_version()}, {platform.machine()}"
    about = {"seeds": scale.seeds, "requests": scale.requests, "many": scale.many, "machine": machine}
    about["trial"] = scale.requests < cell_definitions.FULL.requests
    render.write(folder.folder, tables, [], about)
    if about["trial"]:
        console.print("[yellow]a quick run[/]: it shows that everything works, and says nothing of any editor")
    for table in tables:
        _print_findings(console, table)
    console.print(f"the tables are in [bold]{plain(folder.folder / 'tables.md')}[/] and tables.html", soft_wrap=True)
    if memory:  # last, because it may fail for lack of memory
        rows = training_memory.measure_memory(folder.folder, scale.memory)
        render.write(folder.folder, tables, rows, about)


def _print_findings(console: Console, filled: FilledTable) -> None:
    console.print(f"[bold]{filled.table.heading}[/]: {plain(filled.table.title)}")
    for text, verdict in filled.findings:
        color = {"holds": "green", "does not hold": "red"}.get(verdict, "yellow")
        console.print(f"  [{color}]{verdict}[/]: {plain(text)}", soft_wrap=True)
    for cell, reason in filled.failures.items():
        console.print(f"  {plain(cell)} [red]failed[/]: {plain(reason)}", soft_wrap=True)
