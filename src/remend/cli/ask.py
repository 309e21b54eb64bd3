"""``remend ask``: print a model's answers without and with edits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from remend.cli import options


def ask(
    model: options.Model,
    prompt: Annotated[list[str], typer.Option(help="What to ask; may be given several times.")],
    edit: Annotated[
        list[Path] | None,
        typer.Option(
            "--edit",
            metavar="DIR",
            help="An edit saved by remend edit, several of which act together; without it, only the model as it is.",
        ),
    ] = None,
    chat: options.Chat = False,
    pair: options.PairFlag = False,
    max_new_tokens: options.NewTokens = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Ask the model, without and with edits."""
    from remend.cli.answer_tables import answers_table, as_json, plain_table
    from remend.edit import Edit
    from remend.evaluation.before_after import ask as ask_model
    from remend.saved_folders import write_json

    loaded = Edit.sum([Edit.load(path) for path in edit]) if edit else None
    task = options.load_model(model, device, seed, dtype, quantise)
    answers = ask_model(task, loaded, options.parse_prompts(prompt, chat, pair), max_new_tokens)
    Console().print(plain_table(answers) if loaded is None else answers_table("", answers))
    if json is not None:
        write_json(json, {"answers": as_json(answers)})
