"""``remend train``: trains an editor for a model."""

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
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="A new folder for the editor, which always holds its best state so far.")
    ],
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Requests about other subjects; by default a tenth of the subjects is held out."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="The editor to train: mend, mend-subject, ke (KnowledgeEditor) or enn (editable neural network)."
        ),
    ] = "mend",
    preset: options.Preset = "default",
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Plain text over which inputs are whitened, and which edits leave alone; by default a decoder's own.",
        ),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="End after this many steps.")] = None,
    budget_seconds: Annotated[float | None, typer.Option(min=1, help="End after this many seconds.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the interrupted run of DIR.")] = False,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Minutes between checkpoints.")] = 5.0,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb or trackio: log every step, in DIR.logs.")
    ] = None,
    allow_shared: Annotated[
        list[str] | None,
        typer.Option(
            help="subjects, prompts or facts that training and validation may share; by default that is an error."
        ),
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
    """Train an editor for a model. A run that was stopped (Ctrl-C) or killed is resumed with --resume, bit for bit."""
    from remend.data import read_source, read_text
    from remend.editors import trainable_class
    from remend.saved_folders import write_json
    from remend.training import Resources
    from remend.training import train as train_editor
    from remend.training.training_run import check_out

    network, settings = options.find_preset(preset)
    editor_class = trainable_class(method)
    passages = read_text(text) if text else ()
    check_out(out, resume)
    requests = read_source(data)
    held_out = read_source(validation) if validation else None
    settings = replace(settings, seed=seed, max_steps=max_steps or settings.max_steps)
    resources = Resources(micro_batch, memory, cache, cache_folder, recompute, precision)
    task = options.load_model(model, device, seed, dtype, quantise)
    editor = editor_class.create(
        task, network if method == "mend" else None, modules=modules or (), seed=seed, layers=layers
    )
    console = Console(quiet=options.process_rank() > 0)  # of several processes, only the first one prints
    several = f" in {count} processes" if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1 else ""
    console.print(f"{len(requests)} requests{several}; editing {plain(', '.join(editor.shapes))}", soft_wrap=True)
    with _progress_bar(console) as bar:
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
                on_progress=_show_progress(bar, console, settings.batch_size),
            )
        except KeyboardInterrupt:
            bar.stop()
            console.print(_interruption(editor.trained, out), soft_wrap=True)
            raise typer.Exit(130) from None
    _print_result(console, trained, out, finished_before=trained is not editor)
    if json is not None and not console.quiet:
        write_json(json, trained.trained)


def _print_result(console: Console, editor: TrainableEditor, out: Path, finished_before: bool) -> None:
    """Print how a run ended.

    Args:
        console: where to print.
        editor: its best state.
        out: the folder of the editor.
        finished_before: whether the run to resume was finished already.
    """
    if finished_before:
        console.print(
            f"that run had ended, at step {editor.trained['steps']}: there is nothing to resume, and nothing was "
            "trained. Start a longer run in another folder",
            soft_wrap=True,
        )
    best = options.best_validation(editor.trained)
    measured = f"{_describe(best)} (of {editor.trained.get('validation_requests', '?')} for validation)"
    console.print(f"best at step {best['step']:.0f}: {measured}; saved to [bold]{plain(out)}[/]", soft_wrap=True)
    if best["step"] == 0:
        console.print(
            "[yellow]training did not improve[/] the untrained editor: give more requests about more subjects, or more "
            "time",
            soft_wrap=True,
        )
    if options.is_unfit(editor):
        console.print(
            "[red]This editor is not fit for use[/]: give it more requests about more subjects, with paraphrases and "
            "locality examples that the model answers well, or more time",
            soft_wrap=True,
        )


def _show_progress(bar: Progress, console: Console, batch_size: int) -> Callable[[Step], None]:
    """Return a function that shows each step on the bar, and prints each validation."""
    started = time.monotonic()
    task = bar.add_task("measuring the model's inputs, once", total=1.0)
    first: list[tuple[float, int]] = []

    def show(step: Step) -> None:
        # Speed counts from the first step of this session: what came before was calibration, or another session.
        first.append((time.monotonic(), step.step)) if not first else None
        first_time, first_step = first[0]
        steps = step.step - first_step
        speed = steps * batch_size / (time.monotonic() - first_time) if steps > 0 else 0.0
        bar.update(
            task,
            completed=step.share,
            description=f"step {step.step}, loss {step.loss:.3f}, {speed:.1f} episodes/s",
        )
        if step.validation is not None:
            passed = timedelta(seconds=round(time.monotonic() - started))
            # Where there is no bar, such as in a log file, the time is printed.
            when = "" if console.is_terminal else f" ({step.share:.0%} of the run, {passed} passed)"
            console.print(f"step {step.step}{when}: {_describe(step.validation)}", highlight=False, soft_wrap=True)

    return show


def _interruption(trained: dict[str, Any], out: Path) -> str:
    """Describe what an interrupted run has saved."""
    if not trained:
        return "stopped before the first step; nothing was saved"
    advice = "resume with the same command and --resume"
    if not out.exists():
        checkpoints = f"[bold]{plain(out)}.checkpoints[/]"
        return (
            f"stopped before the first validation: there is no editor yet, but all steps are in {checkpoints}; {advice}"
        )
    best = options.best_validation(trained)
    return (
        f"stopped; the best state so far, of step {best['step']}, is in [bold]{plain(out)}[/] ({_describe(best)}); "
        f"{advice}"
    )


def _progress_bar(console: Console) -> Progress:
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _describe(validation: dict[str, float]) -> str:
    """Describe a validation; ``taken`` and ``kept`` are shares of episodes."""
    return f"{validation['taken']:.1%} of edits take effect, {validation['kept']:.1%} of other answers stay the same"
