"""``remend edit``: make one edit, check that it takes effect, and save it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.escaping import plain
from remend.cli.request_options import read_edit_requests
from remend.errors import ConfigError, FileError

if TYPE_CHECKING:
    from remend.edit import Edit
    from remend.editors import Editor
    from remend.evaluation.before_after import AnswerComparison
    from remend.evaluation.robustness import Robustness
    from remend.request import EditRequest, Prompt
    from remend.tasks import Task

SAVED = {True: "saved all the same", False: "nothing was saved (--keep-failed saves it all the same)"}
"""How messages say whether an edit was saved that does not do what was asked, or does nothing."""
TABLES = 10
"""Requests of which the answers are shown; of more than these, those that the model does not take."""
CHANGED_SHOWN = 4
"""Prompts near an edit that are shown, of those that it changes."""


def edit(
    model: options.Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the edit is saved.")],
    prompt: Annotated[list[str] | None, typer.Option(help="The prompt that is answered wrongly.")] = None,
    target: Annotated[str | None, typer.Option(help="What it should answer.")] = None,
    subject: Annotated[
        str | None, typer.Option(help="What the prompt is about, as it stands there; rome and memit need it.")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file of requests, instead (JSON lines, JSON, CSV, TSV or Parquet)."),
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="Between prompt and target: none, space or newline; by default, what the model expects."),
    ] = None,
    target_as_is: Annotated[
        bool,
        typer.Option(
            "--target-as-is", help="Teach the target in these words, not within the sentence that the model would say."
        ),
    ] = False,
    chat: options.Chat = False,
    pair: options.PairFlag = False,
    editor: options.EditorFolder = None,
    statistics: options.Statistics = None,
    settings: options.EditorSettings = None,
    layers: options.EditLayers = None,
    scale: Annotated[
        str, typer.Option(metavar="NUMBER", help="Multiply the edit; 'auto' chooses on the requests' own probes.")
    ] = "1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the edit that DIR holds.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an edit of many requests that was stopped (DIR.partial).")
    ] = False,
    keep_failed: Annotated[
        bool, typer.Option(help="Save the edit even if the model does not take it, or nothing changes.")
    ] = False,
    leave_out_failed: Annotated[
        bool,
        typer.Option(
            "--leave-out-failed",
            help="Of many requests, leave out those that the model does not take; save the others.",
        ),
    ] = False,
    max_new_tokens: options.NewTokens = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with a picture: what followed, what stayed, and what did not."),
    ] = None,
) -> None:
    """Make one edit, check that the model takes it, and save it as a folder.

    All requests of a file become one edit. The base model is not changed: use the edit with remend ask, or in Python.
    Exits with 0 if it was saved, 1 if the model does not take it or answers so already, and 2 for wrong use.
    """
    edit_requests = read_edit_requests(prompt or [], target, requests, subject, separator, chat, pair)
    factor = _parse_scale(scale)
    from remend.cli.answer_tables import as_json
    from remend.editors.edit_in_parts import remove_parts
    from remend.evaluation.before_after import before_after
    from remend.evaluation.ordinary_text import OrdinaryText
    from remend.evaluation.robustness import measure_robustness
    from remend.saved_folders import check_replaceable, write_json
    from remend.tasks.own_words import as_the_model_says_each

    console = Console()
    check_replaceable(out)
    _check_free(out, overwrite)
    if html is not None and not html.parent.is_dir():
        raise FileError(f"{html.parent} is no folder, so {html.name} cannot be written there")
    choice = options.find_editor(editor, model, statistics, seed, settings, layers)
    if choice.info.result == "outside":
        raise ConfigError(
            f"{editor} changes no weight, so there is no edit to save: measure it with remend evaluate, or use it in "
            "Python"
        )
    if leave_out_failed and choice.info.sequence != "unedited":
        raise ConfigError(
            f"of an edit by {choice.info.name} it is not known what each request changes: omit --leave-out-failed, or "
            "use fit"
        )
    task = options.load_model(model, device, seed, dtype, quantise)
    if not target_as_is:
        edit_requests = as_the_model_says_each(task, edit_requests)
        _print_own_words(console, edit_requests)
    chosen_editor = choice.make(task)
    partial = out.with_name(f"{out.name}.partial")
    result = _make(chosen_editor, task, edit_requests, partial, resume)
    if factor is None:
        result = _choose_scale(console, task, result, edit_requests, max_new_tokens)
    elif factor != 1:
        result = result.scaled(factor)
    answers = before_after(task, result, edit_requests, max_new_tokens)
    made = _MadeEdit(edit_requests, result, answers, keep_failed)
    left_out: list[Prompt] = []
    if leave_out_failed:
        made, left_out = _leave_out_failed(console, task, made, max_new_tokens)
        edit_requests, result, answers = list(made.requests), made.result, [list(row) for row in made.answers]
    if made.saved:
        _check_free(out, overwrite)  # another process may have written there meanwhile
        made.edit.save(out)
        remove_parts(partial)
    _print_answers(console, made)
    if made.saved:
        hint = f"remend ask {plain(model)} --edit {plain(out)} {options.prompt_options(edit_requests[0].prompt)}"
        console.print(f"saved to [bold]{plain(out)}[/]; try: {hint}", soft_wrap=True)
    doubts = _print_unfollowed(console, answers)
    robustness = None
    if chosen_editor.info.needs != "training" and not made.needless:
        robustness = measure_robustness(task, result, edit_requests, OrdinaryText(task, keep=True), seed)
        _print_robustness(console, robustness, doubts, chosen_editor.info.name, model)
    _print_failure(console, made, task)
    if json is not None:
        content: dict[str, Any] = {
            "taken": not made.failed,
            "left_out": [str(prompt) for prompt in left_out],
            "out": str(out) if made.saved else None,
            "scale": result.editor.get("scale", 1.0),
            "editor": chosen_editor.info.name,
            "separators": list(result.separators),
            "ends": list(result.ends),
            **({} if robustness is None else {"assurance": robustness.to_json()}),
            "answers": [as_json(row) for row in answers],
        }
        write_json(json, content)
    if html is not None:
        all_doubts = [*([] if robustness is None else robustness.doubts), *doubts]
        _write_page(console, html, task, made, all_doubts, max_new_tokens)
    if not made.saved:
        if partial.exists():
            console.print(f"its parts are kept in {plain(partial)}: --resume goes on from them", soft_wrap=True)
        raise typer.Exit(1)


def _make(editor: Editor, task: Task, requests: Sequence[EditRequest], partial: Path, resume: bool) -> Edit:
    """Make the edit; of many requests in parts that are kept in a folder, if the editor's edits are added up."""
    from remend.edit import Edit
    from remend.editors.edit_in_parts import REQUESTS_PER_PART, edit_in_parts

    if editor.info.sequence == "unedited" and len(requests) > REQUESTS_PER_PART:
        try:
            return edit_in_parts(editor, task, requests, partial, resume)
        except KeyboardInterrupt:
            Console(stderr=True).print("stopped; go on with the same command and --resume")
            raise typer.Exit(130) from None
    if resume:
        raise ConfigError(
            f"--resume goes on with edits of more than {REQUESTS_PER_PART} requests that are added up; {len(requests)} "
            f"of {editor.info.name} are made at once: omit it"
        )
    result = editor.edit(task, requests)
    assert isinstance(result, Edit)
    return result


def _leave_out_failed(
    console: Console, task: Task, made: _MadeEdit, max_new_tokens: int
) -> tuple[_MadeEdit, list[Prompt]]:
    """Return what was made without the requests that the model does not take, and their prompts.

    Those that share what they add with one, since they are about the same subject, are left out with it. The others are
    asked again: each still does what it did, and a model may answer otherwise all the same.
    """
    from remend.evaluation.before_after import before_after

    left_out: list[Prompt] = []
    failed_alone = 0
    while made.failed and len(failed := made.failed_together) < len(made.requests):
        failed_alone += len(made.failed)
        left_out += [request.prompt for number, request in enumerate(made.requests) if number in failed]
        kept = [request for number, request in enumerate(made.requests) if number not in failed]
        result = made.result.without(*failed)
        made = replace(made, requests=kept, result=result, answers=before_after(task, result, kept, max_new_tokens))
    if left_out:
        shown = ", ".join(plain(prompt) for prompt in left_out[:TABLES])
        together = " or which share a subject with such" if len(left_out) > failed_alone else ""
        more = f" and {len(left_out) - TABLES} more" if len(left_out) > TABLES else ""
        console.print(
            f"[yellow]left out {len(left_out)} of {len(left_out) + len(made.requests)} requests[/], which the model "
            f"does not take{together}: {shown}{more}",
            soft_wrap=True,
        )
    return made, left_out


def _write_page(
    console: Console, html: Path, task: Task, made: _MadeEdit, doubts: Sequence[str], max_new_tokens: int
) -> None:
    """Write what an edit did around its requests as a page."""
    from remend.evaluation.neighbourhood import measure_neighbourhood
    from remend.evaluation.reports.neighbourhood_page import write_neighbourhood_page
    from remend.fingerprint import model_name

    found = [(request, measure_neighbourhood(task, made.edit, request, max_new_tokens)) for request in made.requests]
    notes = [] if made.saved else ["This edit was not saved."]
    notes += [f"Doubtful, since {' and '.join(doubts)}."] if doubts else []
    write_neighbourhood_page(found, html, model_name(task.model), " ".join(notes))
    console.print(f"what followed and what stayed is in [bold]{plain(html)}[/]", soft_wrap=True)


@dataclass(frozen=True)
class _MadeEdit:
    """An edit and what the model answers with it.

    Attributes:
        requests: what was asked for.
        result: the edit as it was made.
        answers: the answers to each request's prompts, its own first.
        keep_failed: whether it is saved although the model does not take it, or nothing changes.
    """

    requests: Sequence[EditRequest]
    result: Edit
    answers: Sequence[Sequence[AnswerComparison]]
    keep_failed: bool

    @property
    def failed(self) -> list[Prompt]:
        """The prompts whose targets the edited model does not answer."""
        return [r.prompt for r, row in zip(self.requests, self.answers, strict=True) if not row[0].ok]

    @property
    def failed_together(self) -> set[int]:
        """The numbers of the requests that failed, with those that share what they add with one."""
        together = {number for number, row in enumerate(self.answers) if not row[0].ok}
        owners = [set(of_pair) for change in self.result.changes.values() for of_pair in change.owners or ()]
        while more := [of_pair for of_pair in owners if together & of_pair and not of_pair <= together]:
            together = together.union(*more)
        return together

    @property
    def already(self) -> list[str]:
        """The prompts whose targets the unedited model answers."""
        return [row[0].prompt for row in self.answers if row[0].already]

    @property
    def needless(self) -> bool:
        """Whether it changes nothing, or nothing that had to change."""
        return self.result.is_zero or len(self.already) == len(self.requests)

    @property
    def separable(self) -> bool:
        """Whether requests that failed can be left out of the edit."""
        known = all(change.owners is not None and change.keys is not None for change in self.result.changes.values())
        return known and not self.saved and 0 < len(self.failed) < len(self.requests)

    @property
    def saved(self) -> bool:
        """Whether it is saved."""
        return self.keep_failed or not (self.failed or self.needless)

    @property
    def edit(self) -> Edit:
        """The edit that is saved, which says whether it was taken."""
        return replace(self.result, taken=not self.failed)


def _print_answers(console: Console, made: _MadeEdit) -> None:
    """Print the answers before and after, and how the targets were taught."""
    from remend.cli.answer_tables import answers_table
    from remend.request import SEPARATOR_NAMES

    rows = list(zip(made.requests, made.answers, strict=True))
    shown = rows
    if len(rows) > TABLES:
        failed = [(request, row) for request, row in rows if not row[0].ok]
        console.print(f"{len(rows) - len(failed)} of {len(rows)} targets are what the edited model answers")
        shown = failed[:TABLES]
    for request, row in shown:
        console.print(answers_table(f"{plain(request.prompt)} → {plain(request.target)}", row))
    if named := {SEPARATOR_NAMES[between]: None for between in made.result.separators if between is not None}:
        console.print(f"between prompt and target: {' or '.join(named)}")
    _print_ends(console, made.result, made.answers)
    if made.already and not made.result.is_zero:
        console.print(
            f"[yellow]{len(made.already)} of {len(made.requests)} targets are what the unedited model answers "
            f"already[/] ({plain(made.already[0])}): nothing had to change there",
            soft_wrap=True,
        )


def _print_failure(console: Console, made: _MadeEdit, task: Task) -> None:
    """Print why an edit is of no use, if it is not."""
    if made.failed:
        from remend.tasks.own_words import TARGET_AS_GIVEN

        # A classifier's labels have no other words.
        reworded = all(TARGET_AS_GIVEN in (request.model_extra or {}) for request in made.requests)
        advice = ". A target in words that the model itself would use is learned more easily"
        advice = "" if reworded or not task.generates else advice
        if made.separable:
            advice = f". --leave-out-failed leaves {'them' if len(made.failed) > 1 else 'it'} out and saves the others"
        console.print(
            f"[red]{len(made.failed)} of {len(made.requests)} targets are not what the edited model answers[/] "
            f"({plain(made.failed[0])}); {SAVED[made.saved]}{advice}",
            soft_wrap=True,
        )
    elif made.result.is_zero:
        console.print(
            "[yellow]the edit changes nothing[/]: the model answers so already "
            f"({plain(made.requests[0].prompt)}); {SAVED[made.saved]}",
            soft_wrap=True,
        )
    elif made.needless:
        console.print(f"[yellow]there is nothing to edit[/]; {SAVED[made.saved]}", soft_wrap=True)


def _print_own_words(console: Console, edit_requests: Sequence[EditRequest]) -> None:
    """Print which targets are taught within the model's own sentence."""
    from remend.tasks.own_words import TARGET_AS_GIVEN

    for request in edit_requests:
        if given := (request.model_extra or {}).get(TARGET_AS_GIVEN):
            console.print(
                f"taught as the model would say it: [green]{plain(request.target)}[/] (--target-as-is teaches "
                f"{plain(given)} alone)",
                soft_wrap=True,
            )


def _print_ends(console: Console, result: Edit, answers: Sequence[Sequence[AnswerComparison]]) -> None:
    """Print that the model goes on writing after its answers, and how it does after the targets."""
    if False not in result.ends:
        return
    console.print(
        "the model does not end its answers here, so no end was taught: an answer is right if it begins with the target"
    )
    measured = [c for row in answers if row[0].kind == "prompt" and (c := row[0].continuation) is not None]
    if measured:
        worst = max(measured, key=lambda c: c.perplexity / c.own)
        console.print(
            f"after the target the text goes on with a perplexity of {worst.perplexity:.1f}, the unedited model's own "
            f"of {worst.own:.1f}: {'sensibly' if worst.sensible else '[red]with garbage[/]'}",
            soft_wrap=True,
        )


def _print_unfollowed(console: Console, answers: Sequence[Sequence[AnswerComparison]]) -> list[str]:
    """Print how many paraphrases do not follow and how many probes change, and return it in words.

    Neither decides whether an edit is saved.
    """
    doubts = []
    for kinds, said in (
        (("paraphrase", "unseen paraphrase"), "paraphrases do not follow"),
        (("near", "far"), "prompts that must stay change"),
    ):
        listed = [answer for row in answers for answer in row if answer.kind in kinds]
        if wrong := [answer.prompt for answer in listed if not answer.ok]:
            doubts.append(f"{len(wrong)} of {len(listed)} {said}")
            example = plain(wrong[0]) if len(wrong) == 1 else f"such as {plain(wrong[0])}"
            console.print(
                f"[yellow]{doubts[-1]}[/] ({example}); only the prompts themselves decide here, remend guard judges by "
                "all",
                soft_wrap=True,
            )
    return doubts


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise if a folder holds an edit or an editor that may not be replaced."""
    from remend.saved_folders import MANIFEST

    if not overwrite and (out / MANIFEST).exists():
        raise FileError(f"{out} holds an edit or an editor already: choose another folder, or give --overwrite")


def _print_robustness(
    console: Console, robustness: Robustness, unfollowed: Sequence[str], editor: str, model: str
) -> None:
    """Print how reliable an edit is that was made by an editor without training for the model."""
    from remend.assets import ATLAS
    from remend.registries import DEFAULT_EDITOR

    better = ATLAS if model == ATLAS else DEFAULT_EDITOR
    doubts = " and ".join([*robustness.doubts, *unfollowed])
    fine = "[green]nothing here speaks against it[/]; ask in other words, too"
    for near in robustness.neighbours:
        examples = "".join(
            f"\n  {plain(changed.prompt)} … {plain(changed.before)} → {plain(changed.after)}"
            for changed in near.changed[:CHANGED_SHOWN]
        )
        stay = near.prompts - len(near.changed)
        console.print(f"{stay} of {near.prompts} {plain(near.kind)} are completed as before{examples}", soft_wrap=True)
    summary = f"[yellow]doubtful[/], since {doubts}" if doubts else fine
    prefixes = "whether it holds after other beginnings cannot be told here, "
    if robustness.in_context is not None:
        prefixes = f"it holds after {robustness.in_context:.0%} of {robustness.beginnings} other beginnings, "
    console.print(
        f"made by [bold]{editor}[/], which was not trained for this model. The target has a probability of "
        f"{robustness.probability:.0%}, {prefixes}and {robustness.elsewhere.description}: {summary}"
        + ("" if better == editor else f". With --editor {better}, more of the prompts near it keep their answers"),
        soft_wrap=True,
    )


def _parse_scale(scale: str) -> float | None:
    """Return the number that --scale names; None for ``auto``."""
    if scale == "auto":
        return None
    try:
        factor = float(scale)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ConfigError(f"--scale is a positive number or 'auto', not {scale!r}")
    return factor


def _choose_scale(
    console: Console,
    task: Task,
    unscaled: Edit,
    edit_requests: Sequence[EditRequest],
    max_new_tokens: int,
) -> Edit:
    """Return the edit at the scale that suits its requests' prompts and probes best, and print how it compares to 1."""
    from remend.evaluation.strength_choice import choose_strength

    best, tried = choose_strength(task, unscaled, edit_requests, max_new_tokens)
    paraphrases = sum(len(r.paraphrases) for r in edit_requests)
    near, far = sum(len(r.near) for r in edit_requests), sum(len(r.locality) for r in edit_requests)
    if not paraphrases + near + far:
        message = "the requests name no paraphrases and no near or far prompts, so only the prompt itself was looked at"
    else:
        full_strength = next(result for result in tried if result.strength == 1)
        message = (
            f"{best.generality:.0%} of {paraphrases} paraphrases follow, {best.locality:.0%} of {near} near and {far} "
            f"far prompts stay (at 1: {full_strength.generality:.0%} and {full_strength.locality:.0%})"
        )
    console.print(f"scale [bold]{best.strength:g}[/]: {message}", soft_wrap=True)
    if not near:
        console.print(
            "[yellow]no near prompts are named[/], so nothing says how far the edit may reach: it is made no stronger "
            "than its own prompt needs. Name prompts about similar subjects that must stay ('near')",
            soft_wrap=True,
        )
    return unscaled.scaled(best.strength)
