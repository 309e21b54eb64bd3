"""``remend reproduce``."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from remend.cli import options
from remend.cli.words import plain
from remend.errors import ConfigError, RemendError

if TYPE_CHECKING:
    from remend.reproduction import Cell, Given, Scale, Workshop


def reproduce(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe for a full-size model; without one, the tables in miniature.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where everything is kept and gone on from; else reproduction, or the recipe."
        ),
    ] = None,
    tables: Annotated[str, typer.Option(metavar="3,5,…", help="Tables: 3 (with 4), 5, 6, 9, 11, memory.")] = (
        "3,5,6,9,11,memory"
    ),
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
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compute cells.")] = 1,
    model: Annotated[str | None, typer.Option(help="Of a recipe: a folder or hub id, in place of its own.")] = None,
    train: Annotated[str | None, typer.Option(metavar="SOURCE", help="Of a recipe: requests to train on.")] = None,
    validation: Annotated[str | None, typer.Option(metavar="SOURCE", help="Of a recipe: to validate on.")] = None,
    test: Annotated[str | None, typer.Option(metavar="SOURCE", help="Of a recipe: requests to judge.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of a recipe: requests of each split, to try it.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Of a recipe: of training, to try it.")] = None,
    device: options.Device = "auto",
    recipes: Annotated[bool, typer.Option("--recipes", help="List the recipes and exit.")] = False,
) -> None:
    """Compare editors as the paper does, on small models, and say which of its findings hold.

    What was computed is kept in --out and never computed again; a run that was stopped goes on with the same command.
    A RECIPE trains and judges MEND for one row of the paper's tables, or for a model of today, at full size: the name
    of one that ships with remend, or a JSON file.
    """
    from remend.reproduction.cells import FULL, QUICK
    from remend.reproduction.tables import TABLES
    from remend.reproduction.worlds import Given

    if recipes:
        _list()
        return
    if recipe is not None:
        given: dict[str, Any] = {
            "model": model,
            "train": train,
            "validation": validation,
            "test": test,
            "max_steps": max_steps,
        }
        given |= {"text": text and str(text), "writer": writer and str(writer), "limit": limit, "device": device}
        if world is not None:
            raise ConfigError("--world is of the tables; a recipe takes --model, --train, --validation and --test")
        _recipe(recipe, out or Path(Path(recipe).stem), given)
        return
    if any(own is not None for own in (model, train, validation, test, limit, max_steps)):
        raise ConfigError("--model, --train, --validation, --test, --limit and --max-steps are of a recipe: name one")
    out = out or Path("reproduction")
    wanted = [part.strip() for part in tables.split(",")]
    if unknown := [name for name in wanted if name not in (*TABLES, "memory")]:
        raise ConfigError(f"there is no table {unknown[0]!r} here; there are {', '.join(TABLES)} and memory")
    scale = QUICK if quick else FULL
    scale = replace(scale, seeds=seeds or scale.seeds)
    there = Given(writer, text, world)
    if cell is not None:
        _one(cell, out, scale, there)
        return
    console = Console()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    shop = _workshop(out, scale, there)
    cells = _ordered([own for name in wanted if name in TABLES for own in TABLES[name].cells(scale, shop.worlds)])
    _compute(console, shop, cells, jobs, there)
    command = _command(out, there, quick, seeds)
    _write(console, shop, [name for name in wanted if name in TABLES], "memory" in wanted, command)


def _list() -> None:
    """The recipes with what they take."""
    from rich.table import Table

    from remend.reproduction.recipe import recipes

    table = Table()
    table.add_column("recipe", no_wrap=True)
    for heading in ("model", "paper: success / drawdown", "GB", "hours (a guess)"):
        table.add_column(heading, overflow="fold")
    for name, own in recipes().items():
        paper = own.paper
        told = "" if paper is None else f"{paper.edit_success} / {paper.drawdown}"
        table.add_row(name, own.model or "to be given", told, f"{own.memory_gb:.0f}", f"{own.hours:g}")
    Console().print(table)


def _recipe(name: str, out: Path, given: dict[str, Any]) -> None:
    """Run one recipe, and say where its summary is."""
    from remend.reproduction.recipe import load_recipe, run_recipe

    console = Console()
    typed = [f"--{key.replace('_', '-')} {value}" for key, value in given.items() if value and value != "auto"]
    command = " ".join(["remend reproduce", name, f"--out {out}", *typed])
    with console.status("reading") as status:
        run_recipe(
            load_recipe(name), out, command=command, on_progress=lambda what: status.update(plain(what)), **given
        )
    console.print(f"the figures, beside the paper's, are in [bold]{plain(out / 'summary.md')}[/]", soft_wrap=True)


def _workshop(out: Path, scale: Scale, given: Given) -> Workshop:
    from transformers.utils import logging

    from remend.reproduction.workshop import Workshop
    from remend.reproduction.worlds import worlds

    logging.disable_progress_bar()
    return Workshop(out, worlds(given), scale)


def _ordered(cells: list[Cell]) -> list[Cell]:
    """Each cell once; those that use one trained editor follow each other."""
    from remend.reproduction.cells import SAME_TRAINING

    once = list(dict.fromkeys(cells))
    return sorted(once, key=lambda own: (own.world, SAME_TRAINING.get(own.method, own.method), own.seed, own.edits))


def _groups(cells: list[Cell]) -> list[list[Cell]]:
    """Cells that use one trained editor, together: only one process may train it."""
    from remend.reproduction.cells import SAME_TRAINING

    found: dict[Any, list[Cell]] = {}
    for own in cells:
        found.setdefault((own.world, SAME_TRAINING.get(own.method, own.method), own.seed), []).append(own)
    return list(found.values())


def _compute(console: Console, shop: Workshop, cells: list[Cell], jobs: int, given: Given) -> None:
    """Measure what is missing, in one process or several, with a bar."""
    from remend.reproduction.worlds import PASSAGES

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
        if PASSAGES in shop.worlds:  # what all processes read is made by one
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
    import torch

    torch.set_num_threads(1)
    _workshop(out, scale, given).compute(cells)


def _one(name: str, out: Path, scale: Scale, given: Given) -> None:
    """Compute one cell and print its figures."""
    from rich.table import Table

    from remend.reproduction.cells import METHODS, Cell

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
    """What computes all this again."""
    parts = ["remend reproduce", f"--out {out.name}"]
    parts += [f"--{name} {path.name}" for name, path in vars(given).items() if path is not None]
    parts += ["--quick"] if quick else []
    parts += [f"--seeds {seeds}"] if seeds else []
    return " ".join(parts)


def _write(console: Console, shop: Workshop, names: list[str], memory: bool, command: str) -> None:
    """Write the tables, say which findings hold and what failed, and only then measure memory, which may fail."""
    from remend.reproduction import memory as measuring
    from remend.reproduction.render import fill, write
    from remend.reproduction.results import Results
    from remend.reproduction.tables import TABLES

    results = Results(shop)
    filled = [fill(TABLES[name], results, f"{command} --tables {name}") for name in names]
    machine = f"Python {platform.python_version()}, {platform.machine()}"
    about = {"seeds": shop.scale.seeds, "requests": shop.scale.requests, "machine": machine}
    write(shop.folder, filled, [], about)
    for own in filled:
        console.print(f"[bold]Table {own.table.name}[/]: {plain(own.table.title)}")
        for says, verdict in own.findings:
            colour = {"holds": "green", "does not hold": "red"}.get(verdict, "yellow")
            console.print(f"  [{colour}]{verdict}[/]: {plain(says)}", soft_wrap=True)
        for cell, why in own.failures.items():
            console.print(f"  {plain(cell)} [red]failed[/]: {plain(why)}", soft_wrap=True)
    console.print(f"the tables are in [bold]{plain(shop.folder / 'tables.md')}[/] and tables.html", soft_wrap=True)
    if memory:
        write(shop.folder, filled, measuring.measure(shop.folder, shop.scale.memory), about)
