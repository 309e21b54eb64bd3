"""``remend data list | show | convert | check``: look at data sets, convert them to requests, check for overlap."""

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
    from remend.registries import DataSet
    from remend.request import EditRequest

app = typer.Typer(
    help="Published data sets as edit requests: list, show, convert and check them.", no_args_is_help=True
)
Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="NAME:FILE (remend data list), atlas:train …, or a file.")
]
MAX_SHOWN = 5
"""The largest number of probes of a kind, or of shared items, that is printed."""
REQUEST_LISTS = (
    *("given_paraphrases", "paraphrases", "unseen_paraphrases", "locality", "near"),
    *("portability", "outdated", "formats", "negated", "generation"),
)
"""The fields of a request that hold several prompts or probes."""


@app.command("list")
def list_(json: options.Json = None) -> None:
    """List the data sets that remend reads."""
    from remend.errors import RegistryError
    from remend.registries import DATASETS
    from remend.saved_folders import write_json

    table = Table(
        Column("name", no_wrap=True), "description", "license", Column("from", overflow="fold"), pad_edge=False
    )
    infos: dict[str, dict[str, Any]] = {}
    for name in DATASETS.names():
        try:
            data_set = DATASETS.get(name)
        except RegistryError as error:
            # A broken package of somebody else must not hide the rest of the list.
            table.add_row(f"[bold]{name}[/]", f"[red]{plain(error)}[/]", "", "")
            continue
        infos[name] = _info(data_set)
        origin = ", ".join(f"{name}:{split}" for split in data_set.splits) or data_set.url
        table.add_row(f"[bold]{name}[/]", plain(data_set.help), plain(data_set.license), plain(origin))
    Console().print(table)
    if json is not None:
        write_json(json, {"data_sets": infos})


@app.command()
def show(
    source: Annotated[str, typer.Argument(metavar="NAME|SOURCE", help="A data set's name, or NAME:FILE, or a file.")],
    sample: Annotated[int, typer.Option(min=1, help="How many requests, drawn with the seed.")] = 3,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Describe a data set, or show some requests of one."""
    from remend.data.source_names import iterate_source
    from remend.registries import DATASETS
    from remend.saved_folders import write_json

    console = Console()
    if source in DATASETS:
        data_set = DATASETS.get(source)
        info = _info(data_set)
        origin = f"{data_set.url} ({data_set.license})" if data_set.url else "; ".join(data_set.splits)
        console.print(f"[bold]{source}[/]: {plain(data_set.help)}\n{plain(origin)}", soft_wrap=True)
        # Readers that are plain functions have no "form".
        if form := getattr(DATASETS.load(source), "form", ""):
            info["row"] = form
            console.print(f"a row: {plain(form)}", soft_wrap=True)
        if json is not None:
            write_json(json, info)
        return
    skipped: Counter[str] = Counter()
    count, requests = _sample_requests(iterate_source(source, _counter(skipped)), sample, seed)
    console.print(f"[bold]{plain(source)}[/]: {count} requests, {len(requests)} of them:", soft_wrap=True)
    for request in requests:
        console.print(_request_table(request))
    _print_skipped(console, skipped)
    if json is not None:
        shown = [request.to_json() for request in requests]
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
    """Write a source's requests as JSON lines, and report what was left out."""
    from remend.saved_folders import atomic_file, write_json

    console = Console()
    skipped: Counter[str] = Counter()
    requests = _iterate_requests(source, model, device, limit, seed, _counter(skipped))
    count, lengths = 0, Counter[str]()
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed} requests"))
    # Streamed, since published files may be larger than memory; atomic, so that an error leaves an earlier file alone.
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar, atomic_file(out) as file:
        progress = bar.add_task("converting", total=None)
        for request in requests:
            file.write(codec.dumps(request.to_json(), ensure_ascii=False) + "\n")
            count += 1
            lengths.update({name: len(getattr(request, name)) for name in REQUEST_LISTS})
            bar.update(progress, completed=count)
    contents = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in lengths.items() if number)
    console.print(f"{count} requests{f' with {contents}' if contents else ''} in [bold]{plain(out)}[/]", soft_wrap=True)
    _print_skipped(console, skipped)
    if json is not None:
        write_json(json, {"source": source, "requests": count, "held": dict(lengths), "left_out": dict(skipped)})


@app.command()
def check(
    first: Source,
    second: Source,
    json: options.Json = None,
) -> None:
    """List the subjects, prompts and facts that are in both sources. Exit code 1 if there are any."""
    from remend.data import read_source
    from remend.data.contamination import find_overlap
    from remend.saved_folders import write_json

    overlap = find_overlap(read_source(first), read_source(second))
    table = Table("shared", Column("", justify="right"), Column("for example", overflow="fold"), pad_edge=False)
    for kind, items in overlap.items():
        style = "red" if items else "green"
        table.add_row(kind, f"[{style}]{len(items)}[/]", plain("; ".join(items[:MAX_SHOWN])))
    Console().print(table)
    if json is not None:
        write_json(json, overlap)
    if any(overlap.values()):
        raise typer.Exit(1)


def _info(data_set: DataSet) -> dict[str, Any]:
    return {
        "help": data_set.help,
        "license": data_set.license,
        "url": data_set.url,
        "splits": list(data_set.splits),
        "needs_model": data_set.needs_model,
    }


def _iterate_requests(
    source: str, model: str | None, device: str, limit: int | None, seed: int, skip: Skip
) -> Iterator[EditRequest]:
    """Yield the requests of a source, made with the model where the data set needs one."""
    from remend.data.source_names import iterate_source, local_path, parse_source_name
    from remend.errors import ConfigError
    from remend.registries import DATASETS

    name, rest = parse_source_name(source)
    if name is None or not DATASETS.get(name).needs_model:
        if model is not None:
            raise ConfigError(
                f"--model is for data sets whose requests a model makes, such as passages:FILE; {source} needs none"
            )
        return islice(iterate_source(source, skip), limit)
    if model is None:
        raise ConfigError(f"a model makes the requests of {source}: give --model")
    generate = DATASETS.load(name)
    task = options.load_model(model, device, seed)
    requests: Iterator[EditRequest] = generate(task, local_path(rest), limit, seed, skip)
    return requests


def _counter(skipped: Counter[str]) -> Skip:
    def skip(reason: str) -> None:
        skipped[reason] += 1

    return skip


def _sample_requests(requests: Iterator[EditRequest], size: int, seed: int) -> tuple[int, list[EditRequest]]:
    """Return the number of requests, and a random sample of them in their order.

    Reservoir sampling: a file of any size is read once, and only the sample is kept in memory.
    """
    rng = random.Random(f"{seed} sample")
    sample: list[tuple[int, EditRequest]] = []
    count = 0
    for count, request in enumerate(requests, start=1):
        if len(sample) < size:
            sample.append((count, request))
        elif (index := rng.randrange(count)) < size:
            sample[index] = (count, request)
    return count, [request for _, request in sorted(sample, key=lambda numbered: numbered[0])]


def _request_table(request: EditRequest) -> Table:
    """Return a table with a row for each prompt: its role in the edit, the prompt, the answer."""
    extra: dict[str, Any] = request.model_extra or {}
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    title = f"{request.subject or 'no subject'}{f' ({request.id})' if request.id is not None else ''}"
    table.add_row("", f"[bold]{plain(title)}[/]", "")
    truth = extra.get("ground_truth", request.target)
    instead = f" [dim]instead of {plain(truth)}[/]" if truth != request.target else ""
    table.add_row("prompt", _shorten(request.prompt), f"[bold]{plain(request.target)}[/]{instead}")
    for name in REQUEST_LISTS:
        items = getattr(request, name)
        for item in items[:MAX_SHOWN]:
            if hasattr(item, "target"):
                kind = (item.model_extra or {}).get("kind")
                table.add_row(f"{name} {plain(kind)}" if kind else name, _shorten(item.prompt), plain(item.target))
            else:
                table.add_row(name.replace("_", " "), _shorten(item), "")
        if len(items) > MAX_SHOWN:
            table.add_row(name.replace("_", " "), f"[dim]and {len(items) - MAX_SHOWN} more[/]", "")
    return table


def _shorten(prompt: object) -> str:
    return plain(textwrap.shorten(str(prompt), 240, placeholder=" …"))


def _print_skipped(console: Console, skipped: Counter[str]) -> None:
    for reason, count in skipped.most_common():
        console.print(f"left out: {count} {plain(reason)}", soft_wrap=True)
