"""The command line of the benchmark: computes cells, writes the tables and prints which findings hold."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from remend.cli import options
from remend.cli.escaping import plain
from remend.cli.recipe import option_name, shell_command
from remend.errors import ConfigError, RemendError, RequestError

if TYPE_CHECKING:
    from .cells import Cell, Scale
    from .workshop import Workshop
    from .worlds import Given

MEMORY = "memory"
"""How Figures 3 and 4 are asked for, among the tables."""


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command()
def paper(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where results are kept; the same folder continues a stopped run.")
    ] = Path("build/paper"),
    tables: Annotated[
        str | None, typer.Option(metavar="3,5,…", help="Of 3 (with 4), 5, 6, 9, 11 and memory, only these.")
    ] = None,
    cell: Annotated[
        str | None, typer.Option(metavar="WORLD/METHOD/EDITS/SEED", help="Only this cell; prints its figures.")
    ] = None,
    writer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A causal language model for the generation task.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Passages that it did not learn from, for its edits.")
    ] = None,
    world: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A model/ and its train, validation and test.jsonl: a column of Table 3."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Every cell, on less data and in minutes.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many times each cell is measured.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compute cells, on one thread each.")] = None,
    device: options.Device = "auto",
) -> None:
    """Compare editors as the paper does, on small models, and say which of its findings hold.

    What was computed is kept in --out and never computed again; a run that was stopped goes on with the same command.
    """
    from .worlds import Given

    _tables(out, tables, cell, Given(writer, text, world, device), quick, seeds, jobs)


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


def _refuse(given: Mapping[str, Any], why: str) -> None:
    """Refuse options that would be ignored.

    Raises:
        ConfigError: one was given.
    """
    if wrong := [option_name(name) for name, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(wrong)}: {why}")


def _tables(
    out: Path,
    tables: str | None,
    cell: str | None,
    given: Given,
    quick: bool,
    seeds: int | None,
    jobs: int | None,
) -> None:
    """Compute the tables, or one cell."""
    from .cells import FULL, QUICK
    from .tables import TABLES

    known = (*TABLES, MEMORY)
    wanted = known if tables is None else [part.strip() for part in tables.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"there is no table {unknown[0]!r} here; there are {', '.join(TABLES)} and {MEMORY}")
    scale = QUICK if quick else FULL
    scale = replace(scale, seeds=seeds or scale.seeds)
    if cell is not None:
        _refuse({"tables": tables, "seeds": seeds, "jobs": jobs}, "of several cells; --cell names one")
        _one(cell, out, scale, given)
        return
    console = Console()
    shop = _workshop(out, scale, given)
    names = [name for name in wanted if name in TABLES]
    at_hand = {name: world for name, world in shop.worlds.items() if world.at_hand}
    cells = _ordered([own for name in names for own in TABLES[name].cells(scale, at_hand)])
    _compute(console, shop, cells, jobs or 1, given)
    _write(console, shop, names, MEMORY in wanted, _command(out, given, quick, seeds))


def _workshop(out: Path, scale: Scale, given: Given) -> Workshop:
    import torch
    from transformers.utils import logging

    from .workshop import Workshop
    from .worlds import worlds

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # sums depend on it: figures shall not depend on --jobs, nor on the number of cores
    return Workshop(out, worlds(given), scale, given.device)


def _ordered(cells: list[Cell]) -> list[Cell]:
    """Each cell once; those that use one trained editor follow each other."""
    from .cells import SAME_TRAINING

    once = list(dict.fromkeys(cells))
    return sorted(once, key=lambda own: (own.world, SAME_TRAINING.get(own.method, own.method), own.seed, own.edits))


def _groups(cells: list[Cell]) -> list[list[Cell]]:
    """Cells that use one trained editor, together: only one process may train it."""
    from .cells import SAME_TRAINING

    found: dict[Any, list[Cell]] = {}
    for own in cells:
        found.setdefault((own.world, SAME_TRAINING.get(own.method, own.method), own.seed), []).append(own)
    return list(found.values())


def _compute(console: Console, shop: Workshop, cells: list[Cell], jobs: int, given: Given) -> None:
    """Measure what is missing, in one process or several, with a bar."""
    from .worlds import PASSAGES

    missing = [own for own in cells if shop.found(own) is None]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("cells", total=len(cells), completed=len(cells) - len(missing))
        shop.on_progress = lambda what: bar.update(task, description=what)
        if jobs == 1:
            for own in missing:
                shop.compute([own])
                bar.advance(task)
                if not console.is_terminal:
                    console.print(f"{own.id}: done", soft_wrap=True)
            return
        if any(own.world == PASSAGES for own in missing):  # what all processes read is made by one
            for split in ("train", "validation", "test"):
                shop.home(PASSAGES).requests(split)
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            groups = _groups(missing)
            running = [pool.submit(_part, shop.folder, shop.scale, given, group) for group in groups]
            for done, group in zip(running, groups, strict=True):
                done.result()
                bar.update(task, advance=len(group), description=group[-1].id)
                if not console.is_terminal:
                    console.print(f"{group[-1].id}: done", soft_wrap=True)


def _part(out: Path, scale: Scale, given: Given, cells: list[Cell]) -> None:
    """One process's part."""
    _workshop(out, scale, given).compute(cells)


def _one(name: str, out: Path, scale: Scale, given: Given) -> None:
    """Compute one cell and print its figures."""
    from rich.table import Table

    from .cells import METHODS, Cell

    cell = Cell.parse(name)
    if cell is None:
        raise ConfigError(f"{name!r} is no cell: it is WORLD/METHOD/EDITS/SEED, with a method of {', '.join(METHODS)}")
    shop = _workshop(out, scale, given)
    shop.compute([cell], again=True)
    found = shop.found(cell)
    assert found is not None
    if "failed" in found:
        raise RemendError(f"{cell.id} failed: {found['failed']}")
    table = Table(title=plain(cell.id), title_justify="left")
    table.add_column("metric")
    table.add_column("mean", justify="right")
    table.add_column("edits", justify="right")
    for metric, own in found["figures"].items():
        table.add_row(metric.replace("_", " "), f"{own['mean']:.3f}", str(own["n"]))
    Console().print(table)


def _command(out: Path, given: Given, quick: bool, seeds: int | None) -> str:
    """What computes all this again, typed in the same folder."""
    told: dict[str, Any] = {"out": out, **vars(given), "seeds": seeds}
    return shell_command(["python", "-m", "benchmarks.paper", *(["--quick"] if quick else [])], told)


def _write(console: Console, shop: Workshop, names: list[str], memory: bool, command: str) -> None:
    """Write the tables, say which findings hold and what failed, and only then measure memory, which may fail."""
    from . import memory as measuring
    from .cells import FULL
    from .render import fill, write
    from .results import Results
    from .tables import TABLES

    results = Results(shop)
    filled = [fill(TABLES[name], results, f"{command} --tables {name}") for name in names]
    machine = f"Python {platform.python_version()}, {platform.machine()}"
    about = {"seeds": shop.scale.seeds, "requests": shop.scale.requests, "many": shop.scale.many, "machine": machine}
    about["trial"] = shop.scale.steps < FULL.steps
    write(shop.folder, filled, [], about)
    if about["trial"]:
        console.print("[yellow]a quick run[/]: it shows that everything works, and says nothing of any editor")
    for own in filled:
        console.print(f"[bold]{own.table.heading}[/]: {plain(own.table.title)}")
        for says, verdict in own.findings:
            colour = {"holds": "green", "does not hold": "red"}.get(verdict, "yellow")
            console.print(f"  [{colour}]{verdict}[/]: {plain(says)}", soft_wrap=True)
        for cell, why in own.failures.items():
            console.print(f"  {plain(cell)} [red]failed[/]: {plain(why)}", soft_wrap=True)
    console.print(f"the tables are in [bold]{plain(shop.folder / 'tables.md')}[/] and tables.html", soft_wrap=True)
    if memory:
        write(shop.folder, filled, measuring.measure(shop.folder, shop.scale.memory), about)
