"""``remend data list | show | convert | check``."""

from __future__ import annotations

import json as codec
import random
import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Column, Table

from remend.cli import options
from remend.cli.escaping import plain

if TYPE_CHECKING:
    from remend.data.json_rows import Skip
    from remend.request import EditRequest

app = typer.Typer(
    help="Published data sets as edit requests: list, show, convert and check them.", no_args_is_help=True
)
Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="NAME:FILE (remend data list), atlas:train …, or a file.")
]
SHOWN = 5
"""How many probes of a kind, or things that two sources share, are shown."""


@app.command("list")
def list_(json: options.Json = None) -> None:
    """List the data sets that remend reads."""
    from remend.data.registry import BUILT_IN, DATA_SETS
    from remend.serialization import write_json

    table = Table(Column("name", no_wrap=True), "what", "licence", Column("from", overflow="fold"), pad_edge=False)
    for name, data in DATA_SETS.items():
        table.add_row(f"[bold]{name}[/]", plain(data.what), plain(data.licence), plain(data.url))
    table.add_section()
    for name in BUILT_IN:
        table.add_row(f"[bold]{name}[/]", f"built in: {name}:train, {name}:validation, {name}:test", "", "")
    Console().print(table)
    if json is not None:
        known = {
            name: {"what": d.what, "form": d.form, "licence": d.licence, "url": d.url} for name, d in DATA_SETS.items()
        }
        write_json(json, {"data_sets": known, "built_in": list(BUILT_IN)})


@app.command()
def show(
    source: Annotated[str, typer.Argument(metavar="NAME|SOURCE", help="A data set's name, or NAME:FILE, or a file.")],
    sample: Annotated[int, typer.Option(min=1, help="How many requests, drawn with the seed.")] = 3,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Show what a data set is, or some requests of one."""
    from remend.data.registry import DATA_SETS
    from remend.data.source_names import iterate_source
    from remend.serialization import write_json

    console = Console()
    if source in DATA_SETS:
        data = DATA_SETS[source]
        console.print(
            f"[bold]{source}[/]: {plain(data.what)}\n{plain(data.url)} ({plain(data.licence)})", soft_wrap=True
        )
        console.print(f"a row: {plain(data.form)}", soft_wrap=True)
        if json is not None:
            write_json(json, {"what": data.what, "form": data.form, "licence": data.licence, "url": data.url})
        return
    skipped: Counter[str] = Counter()
    count, drawn = _drawn(iterate_source(source, _counting(skipped)), sample, seed)
    console.print(f"[bold]{plain(source)}[/]: {count} requests, {len(drawn)} of them:", soft_wrap=True)
    for request in drawn:
        console.print(_described(request))
    _tell_skipped(console, skipped)
    if json is not None:
        shown = [request.to_json() for request in drawn]
        write_json(json, {"source": source, "requests": count, "sample": shown, "left_out": dict(skipped)})


@app.command()
def convert(
    source: Source,
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Where the requests are written, as JSON lines.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="passages: the model whose continuations are the targets.")
    ] = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Write a source's requests as JSON lines, and tell what was left out."""
    from remend.serialization import atomic_file, write_json

    console = Console()
    skipped: Counter[str] = Counter()
    requests = _made(source, model, device, limit, seed, _counting(skipped))
    count, probes = 0, Counter[str]()
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed} requests"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar, atomic_file(out) as file:
        task = bar.add_task("converting", total=None)
        for request in requests:
            file.write(codec.dumps(request.to_json(), ensure_ascii=False) + "\n")
            count += 1
            probes.update({name: len(getattr(request, name)) for name in _LISTS})
            bar.update(task, completed=count)
    held = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in probes.items() if number)
    console.print(f"{count} requests{f' with {held}' if held else ''} in [bold]{plain(out)}[/]", soft_wrap=True)
    _tell_skipped(console, skipped)
    if json is not None:
        write_json(json, {"source": source, "requests": count, "held": dict(probes), "left_out": dict(skipped)})


@app.command()
def check(
    one: Source,
    other: Source,
    json: options.Json = None,
) -> None:
    """Tell what two sources share: subjects, prompts, facts. Exit code 1 if they share anything."""
    from remend.data import read_source
    from remend.data.contamination import shared
    from remend.serialization import write_json

    found = shared(read_source(one), read_source(other))
    table = Table("shared", Column("", justify="right"), Column("for example", overflow="fold"), pad_edge=False)
    for kind, both in found.items():
        style = "red" if both else "green"
        table.add_row(kind, f"[{style}]{len(both)}[/]", plain("; ".join(both[:SHOWN])))
    Console().print(table)
    if json is not None:
        write_json(json, found)
    if any(found.values()):
        raise typer.Exit(1)


_LISTS = (
    *("paraphrases", "unseen_paraphrases", "locality", "near"),
    *("portability", "formats", "negated", "generation"),
)


def _made(
    source: str, model: str | None, device: str, limit: int | None, seed: int, skip: Skip
) -> Iterator[EditRequest]:
    """The requests of a source, or of a text that a model goes on with."""
    from remend.data.registry import PASSAGES
    from remend.data.source_names import iterate_source, local, parted
    from remend.errors import ConfigError

    name, place = parted(source)
    if name != PASSAGES:
        if model is not None:
            raise ConfigError(f"--model makes requests of a text: {PASSAGES}:FILE; {source} needs none")
        return islice(iterate_source(source, skip), limit)
    if model is None:
        raise ConfigError(f"{source}: the targets are a model's own continuations; give --model")
    from remend.data.passages import generation_requests

    base, tokenizer = options.load_model(model, device, seed)
    return generation_requests(base, tokenizer, local(place), limit, seed, skip)


def _counting(skipped: Counter[str]) -> Skip:
    def skip(reason: str) -> None:
        skipped[reason] += 1

    return skip


def _drawn(requests: Iterator[EditRequest], sample: int, seed: int) -> tuple[int, list[EditRequest]]:
    """How many requests there are, and some of them in their order; not all are kept in memory."""
    draw = random.Random(f"{seed} sample")
    held: list[tuple[int, EditRequest]] = []
    count = 0
    for count, request in enumerate(requests, start=1):
        if len(held) < sample:
            held.append((count, request))
        elif (place := draw.randrange(count)) < sample:
            held[place] = (count, request)
    return count, [request for _, request in sorted(held, key=lambda entry: entry[0])]


def _described(request: EditRequest) -> Table:
    """One row a prompt: what it is to the edit, what is asked, what the answer should be."""
    extra: dict[str, Any] = request.model_extra or {}
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    about = f"{request.subject or 'no subject'}{f' ({request.id})' if request.id is not None else ''}"
    table.add_row("", f"[bold]{plain(about)}[/]", "")
    truth = extra.get("ground_truth", request.target)
    instead = f" [dim]instead of {plain(truth)}[/]" if truth != request.target else ""
    table.add_row("prompt", _cut(request.prompt), f"[bold]{plain(request.target)}[/]{instead}")
    for name in _LISTS:
        entries = getattr(request, name)
        for entry in entries[:SHOWN]:
            if hasattr(entry, "target"):
                kind = (entry.model_extra or {}).get("kind")
                table.add_row(f"{name} {plain(kind)}" if kind else name, _cut(entry.prompt), plain(entry.target))
            else:
                table.add_row(name.replace("_", " "), _cut(entry), "")
        if len(entries) > SHOWN:
            table.add_row(name.replace("_", " "), f"[dim]and {len(entries) - SHOWN} more[/]", "")
    return table


def _cut(prompt: object) -> str:
    return plain(textwrap.shorten(str(prompt), 240, placeholder=" …"))


def _tell_skipped(console: Console, skipped: Counter[str]) -> None:
    for reason, count in skipped.most_common():
        console.print(f"left out: {count} {plain(reason)}", soft_wrap=True)
