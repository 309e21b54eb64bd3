"""``remend train``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from remend.cli import options
from remend.cli.escaping import plain

if TYPE_CHECKING:
    from remend.editors import TrainableEditor
    from remend.training import TrainingProgress as Step


def train(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the editor is saved, its best state at any time.")],
    validation: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Requests about other subjects; else a tenth of the subjects.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="mend, or one to compare it with: ke (KnowledgeEditor), enn (editable neural network).")
    ] = "mend",
    preset: options.Preset = "default",
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Plain text to take the inputs' statistics for whitening from; else prompts."
        ),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="End after this many steps.")] = None,
    budget_seconds: Annotated[float | None, typer.Option(min=1, help="End after this many seconds.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was to fill DIR.")] = False,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="How often the whole state is saved.")] = 5.0,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb or trackio: logs of every step, in DIR.logs.")
    ] = None,
    allow_shared: Annotated[
        list[str] | None,
        typer.Option(help="subjects, prompts or facts that both sides may have in common, which else is an error."),
    ] = None,
    modules: options.Modules = None,
    layers: options.Layers = None,
    memory: options.Memory = None,
    micro_batch: options.MicroBatch = None,
    cache: options.CacheGb = 1.0,
    cache_folder: options.CacheFolder = None,
    precision: options.Precision = "float32",
    recompute: options.Recompute = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Train an editor for a model. Stopped with Ctrl-C or killed, it goes on with --resume as if it never had been."""
    from remend.data import read_source, read_text
    from remend.editors import trainable_class
    from remend.serialization import write_json
    from remend.training import Resources
    from remend.training import train as train_editor
    from remend.training.training_run import check_out

    network, settings = options.preset(preset)
    kind = trainable_class(method)
    passages = read_text(text) if text else ()
    check_out(out, resume)
    requests = read_source(data)
    held_out = read_source(validation) if validation else None
    settings = replace(settings, seed=seed, max_steps=max_steps or settings.max_steps)
    resources = Resources(micro_batch, memory, cache, cache_folder, recompute, precision)
    task = options.load_model(model, device, seed, dtype, quantise)
    editor = kind.create(task, network if method == "mend" else None, modules=modules or (), seed=seed, layers=layers)
    console = Console(quiet=options.process() > 0)  # of several processes, the first one speaks
    several = f" in {count} processes" if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1 else ""
    console.print(f"{len(requests)} requests{several}; editing {plain(', '.join(editor.shapes))}", soft_wrap=True)
    with _bar(console) as bar:
        try:
            trained = train_editor(
                task,
                requests,
                held_out,
                config=settings,
                editor=editor,
                resources=resources,
                text=passages,
                budget_seconds=budget_seconds,
                out=out,
                resume=resume,
                checkpoint_minutes=checkpoint_minutes,
                track=track or (),
                allow_shared=allow_shared or (),
                on_progress=_follow(bar, console, settings.batch_size),
            )
        except KeyboardInterrupt:
            bar.stop()
            console.print(_stopped(editor.trained, out), soft_wrap=True)
            raise typer.Exit(130) from None
    _tell(console, trained, out, fresh=trained is editor)
    if json is not None and not console.quiet:
        write_json(json, trained.trained)


def _tell(console: Console, editor: TrainableEditor, out: Path, fresh: bool) -> None:
    """How a run ended; one that is not ``fresh`` had ended before."""
    if not fresh:
        console.print(
            f"that run had ended, at step {editor.trained['steps']}: there is nothing to go on with, and nothing was "
            "trained. A longer run begins anew, in another folder",
            soft_wrap=True,
        )
    best = options.best_of(editor.trained)
    measured = f"{_words(best)} (of {editor.trained.get('validation_requests', '?')} for validation)"
    console.print(f"best at step {best['step']:.0f}: {measured}; saved to [bold]{plain(out)}[/]", soft_wrap=True)
    if best["step"] == 0:
        console.print(
            "[yellow]training made nothing better[/] than the untrained editor it began with: give more requests about "
            "more subjects, or more time",
            soft_wrap=True,
        )
    if options.unfit(editor):
        console.print(
            "[red]This editor is not fit for use[/]: give it more requests about more subjects, with paraphrases and "
            "locality examples that the model answers well, or more time",
            soft_wrap=True,
        )


def _follow(bar: Progress, console: Console, batch_size: int) -> Callable[[Step], None]:
    """Shows each step on the bar, and each validation on a line of its own; with the time, where there is no bar."""
    began = time.monotonic()
    task = bar.add_task("measuring the model's inputs, once", total=1.0)
    first: list[tuple[float, int]] = []

    def follow(step: Step) -> None:
        first.append((time.monotonic(), step.step)) if not first else None
        since, number = first[0]
        speed = (step.step - number) * batch_size / (time.monotonic() - since) if step.step > number else 0.0
        bar.update(
            task,
            completed=step.share,
            description=f"step {step.step}, loss {step.loss:.3f}, {speed:.1f} episodes/s",
        )
        if step.validation is not None:
            passed = timedelta(seconds=round(time.monotonic() - began))
            when = "" if console.is_terminal else f" ({step.share:.0%} of the run, {passed} passed)"
            console.print(f"step {step.step}{when}: {_words(step.validation)}", highlight=False, soft_wrap=True)

    return follow


def _stopped(trained: dict[str, Any], out: Path) -> str:
    """What is left of a run that was interrupted."""
    if not trained:
        return "stopped before the first step; nothing was saved"
    go_on = "go on with the same command and --resume"
    if not out.exists():
        kept = f"[bold]{plain(out)}.checkpoints[/]"
        return f"stopped before the first validation: there is no editor yet, but all steps are in {kept}; {go_on}"
    best = options.best_of(trained)
    return (
        f"stopped; the best state so far, of step {best['step']}, is in [bold]{plain(out)}[/] ({_words(best)}); {go_on}"
    )


def _bar(console: Console) -> Progress:
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _words(measured: dict[str, float]) -> str:
    """Validation in a few words; ``taken`` and ``kept`` are shares of episodes."""
    return f"{measured['taken']:.1%} of edits taken, {measured['kept']:.1%} of other answers kept"
