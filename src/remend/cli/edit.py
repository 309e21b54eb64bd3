"""``remend edit``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.escaping import plain
from remend.errors import ConfigError, FileError, RequestError

if TYPE_CHECKING:
    from remend.edit import Edit
    from remend.evaluation.robustness import Robustness
    from remend.request import EditRequest
    from remend.tasks import Task


def edit(
    model: options.Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the edit is saved.")],
    prompt: Annotated[list[str] | None, typer.Option(help="The prompt that is answered wrongly.")] = None,
    target: Annotated[str | None, typer.Option(help="What it should answer.")] = None,
    subject: Annotated[
        str | None, typer.Option(help="What the prompt is about, as it stands there; rome and memit need it.")
    ] = None,
    requests: Annotated[Path | None, typer.Option(metavar="FILE", help="Requests as JSON lines, instead.")] = None,
    chat: options.Chat = False,
    pair: options.PairFlag = False,
    editor: options.EditorFolder = None,
    statistics: options.Statistics = None,
    settings: options.EditorSettings = None,
    scale: Annotated[
        str, typer.Option(metavar="NUMBER", help="Multiply the edit; 'auto' chooses on the requests' own probes.")
    ] = "1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the edit that DIR holds.")] = False,
    keep_failed: Annotated[bool, typer.Option(help="Save the edit even if the model does not take it.")] = False,
    max_new_tokens: options.NewTokens = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Make one edit, check that the model takes it, and save it as a folder.

    All requests of a file become one edit. The base model is not changed: use the edit with remend ask, or in Python.
    """
    wanted = _requests(prompt or [], target, requests, chat, pair)
    if subject is not None:
        wanted = _about(subject, wanted, requests)
    factor = _factor(scale)
    from remend.cli.answer_tables import answers_table, as_json
    from remend.edit import Edit
    from remend.evaluation.before_after import before_after
    from remend.evaluation.robustness import measure_robustness
    from remend.serialization import MANIFEST, check_replaceable, write_json

    console = Console()
    check_replaceable(out)
    if not overwrite and (out / MANIFEST).exists():
        raise FileError(f"{out} holds an edit or an editor already: choose another folder, or give --overwrite")
    chosen = options.find_editor(editor, model, statistics, seed, settings)
    if chosen.info.result == "outside":
        raise ConfigError(
            f"{editor} changes no weight, so there is no edit to save: measure it with remend evaluate, or use it in "
            "Python"
        )
    task = options.load_model(model, device, seed, dtype, quantise)
    maker = chosen.make(task)
    made = maker.edit(task, wanted)
    assert isinstance(made, Edit)
    if factor is None:
        made = _scaled(console, task, made, wanted, max_new_tokens)
    elif factor != 1:
        made = made.scaled(factor)
    answers = before_after(task, made, wanted, max_new_tokens)
    failed = [r.prompt for r, found in zip(wanted, answers, strict=True) if not found[0].ok]
    saved = not failed or keep_failed
    if saved:
        made.save(out)
    for request, found in zip(wanted, answers, strict=True):
        console.print(answers_table(f"{plain(request.prompt)} → {plain(request.target)}", found))
    if given := [found[0].prompt for found in answers if found[0].before == found[0].wanted]:
        console.print(
            f"[yellow]{len(given)} of {len(wanted)} targets are what the unedited model answers already[/] "
            f"({plain(given[0])}): nothing had to change there",
            soft_wrap=True,
        )
    if saved:
        hint = f"remend ask {plain(model)} --edit {plain(out)} {options.asking(wanted[0].prompt)}"
        console.print(f"saved to [bold]{plain(out)}[/]; try: {hint}", soft_wrap=True)
    sure = None if maker.info.needs == "training" else measure_robustness(task, made, wanted, seed=seed)
    if sure is not None:
        _tell(console, sure, maker.info.name, model)
    if failed:
        console.print(
            f"[red]{len(failed)} of {len(wanted)} targets are not what the edited model answers[/] "
            f"({plain(failed[0])}); "
            + ("saved all the same" if saved else "nothing was saved (--keep-failed saves it all the same)"),
            soft_wrap=True,
        )
    if json is not None:
        out_name = str(out) if saved else None
        content: dict[str, Any] = {"taken": not failed, "out": out_name, "scale": made.editor.get("scale", 1.0)}
        content |= {"editor": maker.info.name, **({} if sure is None else {"assurance": sure.to_json()})}
        write_json(json, {**content, "answers": [as_json(found) for found in answers]})
    if not saved:
        raise typer.Exit(1)


def _about(subject: str, wanted: list[EditRequest], file: Path | None) -> list[EditRequest]:
    """The request of the command line with its subject."""
    if file is not None:
        raise RequestError("--subject belongs to --prompt; in a file, give subject in each request")
    if not subject.strip():
        raise RequestError("--subject: must not be empty")
    return [request.model_copy(update={"subject": subject}) for request in wanted]


def _tell(console: Console, found: Robustness, editor: str, model: str) -> None:
    """How sure one can be of an edit by an editor that was not trained for the model."""
    from remend.assets import ATLAS

    doubts = " and ".join(found.doubts)
    verdict = f"[yellow]doubtful[/], since {doubts}" if doubts else "[green]likely what was wanted[/]"
    held = "whether it holds after other beginnings cannot be told here, "
    if found.in_context is not None:
        held = f"it holds after {found.in_context:.0%} of {found.beginnings} other beginnings, "
    console.print(
        f"made by [bold]{editor}[/], which was not trained for this model. The target has a probability of "
        f"{found.probability:.0%}, {held}and {found.elsewhere:.1%} of the model's {found.choices} choices on other "
        f"input stayed: {verdict}. With a trained editor, more of the prompts near it keep their answers "
        + (f"(--editor {ATLAS})" if model == ATLAS else "(remend train)"),
        soft_wrap=True,
    )


def _factor(scale: str) -> float | None:
    """The number that --scale names; None for ``auto``."""
    if scale == "auto":
        return None
    try:
        factor = float(scale)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ConfigError(f"--scale is a positive number or 'auto', not {scale!r}")
    return factor


def _scaled(
    console: Console,
    task: Task,
    made: Edit,
    wanted: Sequence[EditRequest],
    max_new_tokens: int,
) -> Edit:
    """The edit at the scale that its requests' prompts and probes speak for, and what they say of it and of 1."""
    from remend.evaluation.strength import choose_strength

    best, tried = choose_strength(task, made, wanted, max_new_tokens)
    paraphrases = sum(len(r.paraphrases) for r in wanted)
    near, far = sum(len(r.near) for r in wanted), sum(len(r.locality) for r in wanted)
    if not paraphrases + near + far:
        told = "the requests name no paraphrases and no near or far prompts, so only the prompt itself was looked at"
    else:
        plainly = next(own for own in tried if own.strength == 1)
        told = (
            f"{best.generality:.0%} of {paraphrases} paraphrases follow, {best.locality:.0%} of {near} near and {far} "
            f"far prompts stay (at 1: {plainly.generality:.0%} and {plainly.locality:.0%})"
        )
    console.print(f"scale [bold]{best.strength:g}[/]: {told}", soft_wrap=True)
    if not near:
        console.print(
            "[yellow]no near prompts are named[/], so nothing says how far the edit may reach: it is made no stronger "
            "than its own prompt needs. Name prompts about similar subjects that must stay ('near')",
            soft_wrap=True,
        )
    return made.scaled(best.strength)


def _requests(
    prompts: Sequence[str], target: str | None, file: Path | None, chat: bool, pair: bool
) -> list[EditRequest]:
    """The requests of a command line: one prompt with its target, or a file."""
    from pydantic import ValidationError

    from remend.request import EditRequest, read_requests

    if file is not None and not prompts and target is None:
        if chat:
            raise RequestError("--chat belongs to --prompt; in a file, give messages in place of a prompt")
        if pair:
            raise RequestError("--pair belongs to --prompt; in a file, give a list of two texts as prompt")
        return read_requests(file)
    if not prompts or target is None or file is not None:
        raise RequestError("give --prompt and --target, or --requests FILE")
    asked = options.asked(prompts, chat, pair)
    if len(asked) > 1:
        raise RequestError(f"one edit at a time, not {len(asked)}: give one prompt (for several, --requests FILE)")
    try:
        return [EditRequest(prompt=asked[0], target=target)]
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestError(f"--{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from None
