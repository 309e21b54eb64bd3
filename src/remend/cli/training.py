"""``remend train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from remend.cli import options
from remend.cli.words import plain

if TYPE_CHECKING:
    from remend.training import Progress as Step

DOUBTFUL = 0.5
"""Below this share of edits taken, or of unrelated answers kept, on validation, an editor does more harm than good."""


def train(
    model: options.Model,
    data: Annotated[str, typer.Option(metavar="FILE", help="Requests as JSON lines, or atlas:train.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the editor is saved, its best state at any time.")],
    validation: Annotated[
        str | None, typer.Option(metavar="FILE", help="Requests about other subjects; else a tenth of the subjects.")
    ] = None,
    preset: Annotated[str, typer.Option(help="paper or default.")] = "default",
    max_steps: Annotated[int | None, typer.Option(min=1, help="End after this many steps.")] = None,
    budget_seconds: Annotated[float | None, typer.Option(min=1, help="End after this many seconds.")] = None,
    modules: Annotated[
        list[str] | None, typer.Option(help="Globs of the matrices to edit; MLPs of the last 3 blocks.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Train an editor for a model. It can be stopped with Ctrl-C at any time; the best state so far is in DIR."""
    from remend.data import read_source
    from remend.editors import Mend
    from remend.errors import ConfigError, nearest
    from remend.storage import write_json
    from remend.training import PRESETS
    from remend.training import train as train_editor

    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; {nearest(preset, PRESETS)}")
    requests = read_source(data)
    held_out = read_source(validation) if validation else None
    network, settings = PRESETS[preset]
    settings = replace(settings, seed=seed, max_steps=max_steps or settings.max_steps)
    base, tokenizer = options.load_model(model, device, seed, dtype, quantise)
    editor = Mend.for_model(base, network, modules or (), seed)
    console = Console()
    console.print(f"{len(requests)} requests; editing {plain(', '.join(editor.shapes))}", soft_wrap=True)
    with _bar(console) as bar:
        task = bar.add_task("measuring the start", total=1.0)

        def follow(step: Step) -> None:
            bar.update(task, completed=step.share, description=f"step {step.step}, loss {step.loss:.3f}")
            if step.validation is not None:
                console.print(f"step {step.step}: {_words(step.validation)}", highlight=False)

        try:
            trained = train_editor(
                base,
                tokenizer,
                requests,
                held_out,
                config=settings,
                editor=editor,
                budget_seconds=budget_seconds,
                out=out,
                on_progress=follow,
            )
        except KeyboardInterrupt:
            bar.stop()
            console.print(_stopped(editor.trained, out), soft_wrap=True)
            raise typer.Exit(130) from None
    best = min(trained.trained["history"], key=lambda entry: entry["loss"])
    console.print(f"best at step {best['step']:.0f}: {_words(best)}; saved to [bold]{plain(out)}[/]", soft_wrap=True)
    if min(best["taken"], best["kept"]) < DOUBTFUL:
        console.print(
            "[red]This editor is not fit for use[/]: give it more requests about more subjects, with paraphrases and "
            "locality examples that the model answers well, or more time",
            soft_wrap=True,
        )
    if json is not None:
        write_json(json, trained.trained)


def _stopped(trained: dict[str, Any], out: Path) -> str:
    """What is left of a run that was interrupted."""
    if not out.exists() or not trained:
        return "stopped before anything was learnt; nothing was saved"
    best = min(trained["history"], key=lambda entry: entry["loss"])
    return f"stopped; the best state so far, of step {best['step']}, is in [bold]{plain(out)}[/]: {_words(best)}"


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)


def _words(measured: dict[str, float]) -> str:
    """Validation in a few words; ``taken`` and ``kept`` are shares of episodes."""
    return f"{measured['taken']:.1%} of edits taken, {measured['kept']:.1%} of unrelated answers kept"
