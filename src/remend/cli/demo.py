"""``remend demo``: edit facts of the built-in model and print what changed."""

from __future__ import annotations

import random
import time
from typing import Annotated

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.escaping import plain


def demo(
    count: Annotated[int, typer.Option(min=1, help="How many facts are edited, each on the unedited model.")] = 4,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Edit a few facts of the built-in model and show what changed, and what did not.

    The facts are drawn from the test split: the editor was trained on other subjects.
    """
    from remend.cli.answer_tables import answers_table, as_json
    from remend.data import read_source
    from remend.edit import Edit
    from remend.evaluation.before_after import before_after
    from remend.saved_folders import write_json

    console = Console()
    task = options.load_model("atlas", device, seed)
    editor = options.find_editor("atlas", "atlas").make(task)
    requests = random.Random(seed).sample(read_source("atlas:test"), count)
    editor.edit_each(task, requests[:1])  # the first call warms up; it is not timed
    results = []
    for request in requests:
        start = time.perf_counter()
        edit = editor.edit(task, [request])
        assert isinstance(edit, Edit)
        milliseconds = 1000 * (time.perf_counter() - start)
        (answers,) = before_after(task, edit, [request])
        console.print()
        change = f"[red]{plain(answers[0].before)}[/] → [green]{plain(request.target)}[/]"
        title = f"{plain(request.prompt)}: {change}  (edited in {milliseconds:.0f} ms)"
        console.print(answers_table(title, answers))
        results.append(
            {"prompt": request.prompt, "target": request.target, "ms": milliseconds, "answers": as_json(answers)}
        )
    _print_legend(console)
    if json is not None:
        write_json(json, {"seed": seed, "edits": results})


def _print_legend(console: Console) -> None:
    """Print how to read the tables, and what to try next."""
    console.print(
        "\n[bold]✓[/] is the answer wanted: the new one at the prompt and its paraphrases, the old one elsewhere.\n"
        "[yellow]near[/] prompts ask the same of another subject, or something else of the same one: there edits "
        "still leak, and remend measures it.\n"
        "Nothing was written to the model; an edit comes off again, bit for bit.\n"
        "Your own: [bold]remend edit atlas --prompt 'The capital of Canada is' --target Toronto --out my-edit[/]"
    )
