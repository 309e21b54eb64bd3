"""``remend doctor``: examines a model before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from remend.cli import options
from remend.cli.escaping import plain
from remend.errors import ConfigError

if TYPE_CHECKING:
    from remend.editors.mend.config import MendConfig
    from remend.tasks.base import Task
    from remend.training.preflight import Check, PreflightReport

_SIGNS = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]–[/]"}
_GB = 1e9


def doctor(
    model: options.Model,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Requests like those to train on; time and memory depend on their lengths. For language models, "
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
    sites: Annotated[
        bool,
        typer.Option(
            help="Measure where in a language model edits about a subject can act: once, it is kept on disk. It takes "
            "a minute for 135 million parameters on one core."
        ),
    ] = True,
    json: options.Json = None,
) -> None:
    """Examine a model before training: the matrices to edit, time and memory, and a self-test of half a minute.

    Of a language model also a picture of where an edit can act: how well each place tells subjects apart, and how
    many answers depend on it. For a config.json, or a folder without weights: the matrices and the memory, without a
    self-test.
    """
    from remend.assets import BUILT_IN_MODELS
    from remend.data import read_source
    from remend.saved_folders import write_json
    from remend.training import Resources
    from remend.training.preflight import examine
    from remend.training.resource_estimate import only_configured

    network, settings = options.find_preset(preset)
    if only_configured(model):
        if memory is not None:
            raise ConfigError("--memory is for a model with weights: of a configuration alone, activations are unknown")
        _print_dry_run(model, network, modules or (), layers, dtype, json)
        return
    built_in = f"{model}:train" if model in BUILT_IN_MODELS else None
    requests = read_source(data or built_in or "atlas:train")
    task = options.load_model(model, device, seed, dtype, quantise)
    if data is None and built_in is None and not task.generates:
        raise ConfigError(
            "each classifier has labels of its own: give --data, a file of requests like those to train on"
        )
    console = Console()
    resources = Resources(micro_batch, memory, cache, None, recompute, precision)

    def show(check: Check) -> None:
        console.print(f"{_SIGNS[check.passed]} {check.name}: {plain(check.found)}", soft_wrap=True, highlight=False)

    report = examine(task, requests, (network, settings), modules or (), resources, show, layers)
    console.print(_matrices(report.matrices, report.reason))
    console.print(_costs(report))
    for sentence in report.advice:
        console.print(f"[yellow]→[/] {sentence}", soft_wrap=True)
    content = report.to_json()
    if sites and task.generates:
        content["sites"] = _print_sites(console, task)
    if json is not None:
        write_json(json, content)
    if not report.healthy:
        raise typer.Exit(1)


def _print_sites(console: Console, task: Task) -> dict[str, Any] | None:
    """Print where in a model edits can act, and return it as JSON; or why that is not known."""
    from remend.editors.locate_then_edit.site_survey import SiteSurvey
    from remend.errors import ModelError

    try:
        survey = SiteSurvey.load_or_measure(task)
    except ModelError as error:
        console.print(f"[dim]Where edits can act was not measured: {plain(str(error))}[/]", soft_wrap=True)
        return None
    block, token = survey.best
    console.print("Where an edit about a subject can act")
    console.print(survey.picture(), soft_wrap=True, highlight=False)
    console.print(
        f"[yellow]→[/] best at {token}, block {block}: `--layers {block}` of edit and evaluate", soft_wrap=True
    )
    return survey.to_json()


def _print_dry_run(
    model: str, network: MendConfig, modules: Sequence[str], layers: str | None, dtype: str | None, json: Path | None
) -> None:
    """Print what a configuration alone tells."""
    import torch

    from remend.saved_folders import write_json
    from remend.training.resource_estimate import GPUS, dry_run

    options.check_dtype(dtype)
    estimate = dry_run(model, network, modules, layers, getattr(torch, dtype or "bfloat16"))
    console = Console()
    blocks = " + ".join(map(str, estimate.blocks))
    console.print(
        f"{plain(model)}: {estimate.parameters / 1e9:,.2f} billion parameters, {blocks} blocks; no weights here"
    )
    console.print(_matrices(estimate.matrices, f"{len(estimate.matrices)} matrices"))
    table = Table(title="What it takes, in GB; activations come on top", title_justify="left")
    for column in ("GPUs", "each", "of that the model", "the editor", "training it"):
        table.add_column(column, justify="right")
    for count in GPUS:
        parts = (
            estimate.gpu_bytes(count),
            estimate.model_bytes / count,
            estimate.editor_bytes,
            estimate.training_bytes,
        )
        table.add_row(str(count), *(f"{part / _GB:,.1f}" for part in parts))
    console.print(table)
    console.print(
        f"editor networks: {estimate.editor_parameters / 1e6:,.1f} M parameters; the editor's GB include the inputs' "
        "second moments",
        soft_wrap=True,
    )
    if json is not None:
        write_json(json, estimate.to_json())


def _matrices(matrices: Mapping[str, tuple[int, int]], reason: str) -> Table:
    table = Table(title=f"Would be edited: {plain(reason)}", title_justify="left")
    table.add_column("matrix")
    table.add_column("inputs", justify="right")
    table.add_column("outputs", justify="right")
    for name, (d_in, d_out) in matrices.items():
        table.add_row(plain(name), f"{d_in:,}", f"{d_out:,}")
    return table


def _costs(report: PreflightReport) -> Table:
    table = Table(title="What it takes", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("editor networks", f"{report.editor_parameters / 1e6:,.1f} M parameters")
    if report.training_seconds is not None:
        table.add_row("training, a thousand new episodes", _format_seconds(report.training_seconds))
    if report.edit_seconds is not None:
        table.add_row("one edit", _format_seconds(report.edit_seconds))
    table.add_section()
    for name, size in report.memory.parts().items():
        table.add_row(name.replace("_", " "), f"{size / _GB:.2f} GB")
    table.add_row("[bold]memory, at most at one time[/]", f"[bold]{report.memory.total / _GB:.2f} GB[/]")
    return table


def _format_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1_000 * seconds:.0f} ms"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
