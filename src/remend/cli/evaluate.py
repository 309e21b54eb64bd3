"""``remend evaluate``: measure an editor on a file of requests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from remend.cli import options
from remend.cli.escaping import plain
from remend.cli.report_tables import print_report
from remend.errors import ConfigError

SUITES = ("given", "full")

if TYPE_CHECKING:
    from remend.evaluation import LmEvalTasks, Report


def evaluate(
    model: options.Model,
    data: options.Data,
    editor: options.EditorFolder = None,
    edited_model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Evaluate this checkpoint, which holds the edits, in place of an editor."),
    ] = None,
    statistics: options.Statistics = None,
    settings: options.EditorSettings = None,
    layers: options.EditLayers = None,
    protocol: Annotated[
        str,
        typer.Option(help="single: each edit alone. batched: several at once. sequential: one after another."),
    ] = "single",
    edits: Annotated[
        str | None, typer.Option(metavar="1,5,25,…", help="batched, sequential: how many edits are applied at once.")
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="sequential: evaluate all edits so far after every N, and after the last."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate only this many requests, drawn with the seed.")
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="given: what the requests name. full: also what rules make of each: what follows, what must no longer "
            "be said, denial, yes or no, and related prompts; single edits also with noise, and with a part left out."
        ),
    ] = "given",
    max_new_tokens: options.NewTokens = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    baselines: Annotated[
        bool, typer.Option(help="Also evaluate the unedited model, as it is and with the fact in its prompt.")
    ] = True,
    frontier: Annotated[
        bool, typer.Option(help="Also evaluate single edits at 0.25 to 2 times their strength.")
    ] = True,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ordinary text to measure edits on; by default the model's own.")
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(min=0, help="The number of tokens of ordinary text; 0 to leave it out.")
    ] = 1024,
    abilities: Annotated[
        bool,
        typer.Option(
            "--abilities",
            help="batched, sequential: also measure whether sums, facts in the prompt and common facts stay right.",
        ),
    ] = False,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,…",
            help="Also measure general ability in these tasks of lm-evaluation-harness, without edits and with all "
            "edits of the last run applied (of single edits, with the first one).",
        ),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with YAML files of further tasks.")
    ] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(min=1, help="The number of samples of each task.")] = None,
    json: options.Json = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with plots and every edit.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the plots of the page as PNG and SVG files.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue a stopped run from the folder beside --json.")] = False,
) -> None:
    """Make the edits of a whole file and measure success, generality and locality.

    The frontier shows how success and locality change with the strength of the edits.
    """
    from remend.data import read_source, read_text
    from remend.evaluation import evaluate as evaluate_edits
    from remend.evaluation import evaluate_checkpoints
    from remend.evaluation.protocols import FRONTIER_STRENGTHS
    from remend.evaluation.reports.figure_style import check_matplotlib
    from remend.evaluation.reports.html_report import write_html_report
    from remend.evaluation.reports.plots import save_plots
    from remend.expansion import add_probes

    frontier = frontier and protocol == "single" and edited_model is None
    if html is not None or pictures is not None:
        check_matplotlib()
    if resume and json is None:
        raise ConfigError("--resume continues from the folder beside the report: give the same --json FILE as before")
    examined = _lm_eval_tasks(lm_eval, lm_eval_path, lm_eval_limit)
    requests = read_source(data)
    if limit is not None and limit < len(requests):
        requests = [requests[i] for i in sorted(random.Random(seed).sample(range(len(requests)), limit))]
    passages = [] if text is None else read_text(text)
    if suite not in SUITES:
        raise ConfigError(f"there is no suite {suite!r}; it is one of {', '.join(SUITES)}")
    if edited_model is not None and (
        editor or statistics or settings or layers or edits or every or abilities or resume or protocol != "single"
    ):
        raise ConfigError(
            "the edits are in --edited-model already: omit --editor, --statistics, --set, --protocol, --edits, "
            "--every, --abilities and --resume"
        )
    sizes = _sizes(protocol, edits, every, len(requests))
    console = Console()
    chosen = (
        None if edited_model is not None else options.find_editor(editor, model, statistics, seed, settings, layers)
    )
    if frontier and chosen is not None and chosen.info.result == "outside":
        console.print(f"edits by {chosen.info.name} have no strength, so there is no frontier of it")
        frontier = False
    if examined is not None and chosen is not None and chosen.info.name == "in-context":
        raise ConfigError("in-context does not change the model, nor its general ability: omit --lm-eval")
    used = {
        "limit": limit,
        "suite": None if suite == "given" else suite,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "text": text and str(text),
        "set": settings,
        "layers": layers,
    }

    def finish(report: Report) -> Report:
        """Add the options to a report and save it, before anything else can go wrong."""
        report = replace(report, settings={name: value for name, value in used.items() if value is not None})
        if json is not None:
            report.save(json)
        return report

    partial = None if json is None else json.with_name(f"{json.name}.partial")
    with _announce_resume(partial, resume), Progress(console=console, disable=not console.is_terminal) as bar:
        progress = bar.add_task("editing", total=None)
        common: dict[str, Any] = {
            "baselines": baselines, "text": passages, "text_tokens": text_tokens, "lm_eval": examined,
            "data": data, "max_new_tokens": max_new_tokens,
            "on_progress": lambda done, total: bar.update(progress, completed=done, total=total),
        }  # fmt: skip
        task = options.load_model(model, device, seed, dtype, quantise)
        if suite == "full":
            requests = add_probes(task, requests, seed)
        if chosen is None:
            edited = options.load_model(str(edited_model), device, seed, dtype, quantise)
            name = Path(str(edited_model)).name
            report = finish(evaluate_checkpoints(task, edited, requests, name=name, **common))
        else:
            made = chosen.make(task)
            report = evaluate_edits(
                task, made, requests,
                protocol=protocol, edits=sizes, abilities=abilities, strengths=FRONTIER_STRENGTHS if frontier else (),
                perturbed=suite == "full" and protocol == "single" and made.info.result != "outside",
                name=Path(editor or made.info.name).name, checkpoint=partial, resume=resume,
                on_report=finish, **common,
            )  # fmt: skip
    print_report(report, console)
    if json is not None:
        console.print(f"every edit is in [bold]{plain(json)}[/]", soft_wrap=True)
    if html is not None:
        write_html_report(report, html)
        console.print(f"the report to look at is [bold]{plain(html)}[/]", soft_wrap=True)
    if pictures is not None:
        names = save_plots(report, pictures)
        console.print(f"drawn in [bold]{plain(pictures)}[/]: {', '.join(names)}", soft_wrap=True)


def _lm_eval_tasks(tasks: str | None, folder: Path | None, limit: int | None) -> LmEvalTasks | None:
    """Return the tasks of lm-eval that the options name, if they name any."""
    from remend.evaluation import LmEvalTasks

    if tasks is not None:
        return LmEvalTasks(tuple(part.strip() for part in tasks.split(",")), folder, limit)
    if folder is not None or limit is not None:
        raise ConfigError("--lm-eval-path and --lm-eval-limit need --lm-eval: name the tasks, --lm-eval TASK,…")
    return None


@contextmanager
def _announce_resume(partial: Path | None, resume: bool) -> Iterator[None]:
    """Tell from which parts the evaluation goes on and, if it is stopped, how to go on later."""
    console = Console(stderr=True)  # standard output is for the tables
    if resume and partial is not None:
        done = len([file for file in partial.glob("*.json") if file.name != "about.json"])
        console.print(f"resuming: {done} parts are done")
    try:
        yield
    except KeyboardInterrupt:
        if partial is None:
            console.print("stopped; nothing is stored (with --json FILE, a stopped evaluation can be resumed)")
        else:
            console.print(f"stopped; resume with the same command and --resume ({plain(partial)})", soft_wrap=True)
        raise typer.Exit(130) from None


def _sizes(protocol: str, edits: str | None, every: int | None, requests: int) -> list[int]:
    """Return after how many edits an evaluation is made, by the options; nothing for the default."""
    if every is None:
        return _numbers(edits)
    if protocol != "sequential":
        raise ConfigError("--every is for edits one after another: give --protocol sequential")
    if edits is not None:
        raise ConfigError("--every and --edits both say after how many edits an evaluation is made: give one of them")
    return sorted({*range(every, requests + 1, every), requests})


def _numbers(text: str | None) -> list[int]:
    """Return the numbers of a list such as ``1,5,25``."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise ConfigError(f"--edits takes a list of numbers such as 1,5,25; {wrong[0]!r} is not a number")
    return [int(part) for part in parts]
