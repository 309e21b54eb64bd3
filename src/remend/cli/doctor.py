"""``remend doctor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from remend.cli import options
from remend.cli.escaping import plain
from remend.errors import ConfigError

if TYPE_CHECKING:
    from remend.editors.mend.config import MendConfig
    from remend.training.preflight import Check, PreflightReport

_SIGNS = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]–[/]"}
_GIGABYTE = 1e9


def doctor(
    model: options.Model,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Requests like those to train on; their lengths decide time and memory. Of a language model, "
            "atlas:train by default.",
        ),
    ] = None,
    preset: options.Preset = "default",
    modules: options.Modules = None,
    layers: options.Layers = None,
    memory: options.Memory = None,
    micro_batch: options.MicroBatch = None,
    cache: options.CacheGb = 1.0,
    precision: options.Precision = "float32",
    recompute: options.Recompute = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Examine a model before training: what would be edited, what that takes, and a self-test of half a minute.

    Of a config.json, or a folder without weights: what would be edited, and what it would take, without a self-test.
    """
    from remend.assets import BUILT_IN_MODELS
    from remend.data import read_source
    from remend.serialization import write_json
    from remend.training import Resources
    from remend.training.preflight import examine
    from remend.training.resource_estimate import only_configured

    chosen = options.preset(preset)
    if only_configured(model):
        if memory is not None:
            raise ConfigError("--memory is for a model with weights: of a configuration alone, activations are unknown")
        _dry(model, chosen[0], modules or (), layers, dtype, json)
        return
    own = f"{model}:train" if model in BUILT_IN_MODELS else None
    requests = read_source(data or own or "atlas:train")
    task = options.load_model(model, device, seed, dtype, quantise)
    if data is None and own is None and not task.generates:
        raise ConfigError("a classifier's labels are its own: give --data, a file of requests like those to train on")
    console = Console()
    resources = Resources(micro_batch, memory, cache, None, recompute, precision)

    def show(check: Check) -> None:
        console.print(f"{_SIGNS[check.passed]} {check.name}: {plain(check.found)}", soft_wrap=True, highlight=False)

    found = examine(task, requests, chosen, modules or (), resources, show, layers)
    console.print(_matrices(found.matrices, found.reason))
    console.print(_costs(found))
    for sentence in found.advice:
        console.print(f"[yellow]→[/] {sentence}", soft_wrap=True)
    if json is not None:
        write_json(json, found.to_json())
    if not found.healthy:
        raise typer.Exit(1)


def _dry(
    model: str, network: MendConfig, modules: Sequence[str], layers: str | None, dtype: str | None, json: Path | None
) -> None:
    """What the configuration alone tells."""
    import torch

    from remend.serialization import write_json
    from remend.training.resource_estimate import GPUS, dry_run

    found = dry_run(model, network, modules, layers, getattr(torch, options.known_dtype(dtype) or "bfloat16"))
    console = Console()
    blocks = " + ".join(map(str, found.blocks))
    console.print(f"{plain(model)}: {found.parameters / 1e9:,.2f} billion parameters, {blocks} blocks; no weights here")
    console.print(_matrices(found.matrices, f"{len(found.matrices)} matrices"))
    table = Table(title="What it takes, in GB; activations come on top", title_justify="left")
    for column in ("GPUs", "each", "of that the model", "the editor", "training it"):
        table.add_column(column, justify="right")
    for count in GPUS:
        parts = (found.gpu_bytes(count), found.model_bytes / count, found.editor_bytes, found.training_bytes)
        table.add_row(str(count), *(f"{part / _GIGABYTE:,.1f}" for part in parts))
    console.print(table)
    console.print(
        f"editor networks: {found.editor_parameters / 1e6:,.1f} M parameters; their GB are of these and of the inputs' "
        "second moments",
        soft_wrap=True,
    )
    if json is not None:
        write_json(json, found.to_json())


def _matrices(matrices: Mapping[str, tuple[int, int]], reason: str) -> Table:
    table = Table(title=f"Would be edited: {plain(reason)}", title_justify="left")
    table.add_column("matrix")
    table.add_column("inputs", justify="right")
    table.add_column("outputs", justify="right")
    for name, (d_in, d_out) in matrices.items():
        table.add_row(plain(name), f"{d_in:,}", f"{d_out:,}")
    return table


def _costs(found: PreflightReport) -> Table:
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
