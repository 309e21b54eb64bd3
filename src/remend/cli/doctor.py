"""``remend doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from remend.cli import options
from remend.cli.words import plain

if TYPE_CHECKING:
    from remend.training.doctor import Check, Diagnosis

_SIGNS = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]–[/]"}
_GIGABYTE = 1e9


def doctor(
    model: options.Model,
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Requests like those to train on; their lengths decide time and memory.")
    ] = "atlas:train",
    preset: options.Preset = "default",
    modules: options.Modules = None,
    layers: options.Layers = None,
    memory: options.Memory = None,
    micro_batch: options.MicroBatch = None,
    cache: options.Cache = 1.0,
    precision: options.Precision = "float32",
    recompute: options.Recompute = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Examine a model before training: what would be edited, what that takes, and a self-test of half a minute."""
    from remend.data import read_source
    from remend.storage import write_json
    from remend.training import Resources
    from remend.training.doctor import examine

    chosen = options.preset(preset)
    requests = read_source(data)
    base, tokenizer = options.load_model(model, device, seed, dtype, quantise)
    console = Console()
    resources = Resources(micro_batch, memory, cache, None, recompute, precision)

    def show(check: Check) -> None:
        console.print(f"{_SIGNS[check.passed]} {check.name}: {plain(check.found)}", soft_wrap=True, highlight=False)

    found = examine(base, tokenizer, requests, chosen, modules or (), resources, show, layers)
    console.print(_matrices(found))
    console.print(_costs(found))
    for sentence in found.advice:
        console.print(f"[yellow]→[/] {sentence}", soft_wrap=True)
    if json is not None:
        write_json(json, found.to_json())
    if not found.healthy:
        raise typer.Exit(1)


def _matrices(found: Diagnosis) -> Table:
    table = Table(title=f"Would be edited: {plain(found.reason)}", title_justify="left")
    table.add_column("matrix")
    table.add_column("inputs", justify="right")
    table.add_column("outputs", justify="right")
    for name, (d_in, d_out) in found.matrices.items():
        table.add_row(plain(name), f"{d_in:,}", f"{d_out:,}")
    return table


def _costs(found: Diagnosis) -> Table:
    table = Table(title="What it takes", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("editor networks", f"{found.editor_parameters / 1e6:,.1f} M parameters")
    if found.training_seconds is not None:
        table.add_row("training, a thousand new episodes", _time(found.training_seconds))
    if found.edit_seconds is not None:
        table.add_row("one edit", _time(found.edit_seconds))
    table.add_section()
    for name, size in found.memory.parts().items():
        table.add_row(name.replace("_", " "), f"{size / _GIGABYTE:.2f} GB")
    table.add_row("[bold]memory, at most at one time[/]", f"[bold]{found.memory.total / _GIGABYTE:.2f} GB[/]")
    return table


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1_000 * seconds:.0f} ms"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
