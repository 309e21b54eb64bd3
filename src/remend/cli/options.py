"""Options that several commands share, and how their values become prompts, presets, models and editors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.console import Console

from remend.cli.escaping import plain
from remend.registries import DEFAULT_EDITOR, EDITORS, EditorEntry

if TYPE_CHECKING:
    from remend.config import Config
    from remend.editors import DefaultEditor, Editor, EditorInfo, MendConfig, TrainableEditor
    from remend.request import Prompt
    from remend.tasks import Task
    from remend.training import TrainingConfig


def _untrained() -> list[EditorEntry]:
    """Return the editors of remend that need no training."""
    # Those of other packages would have to be imported: too slow, and a broken one would disturb every command.
    return [entry for entry in map(EDITORS.get, EDITORS.registered_names()) if entry.needs != "training"]


Model = Annotated[
    str,
    typer.Argument(help="'atlas', 'questions', 'claims' (ship with remend), a local folder, a GGUF file, or a hub id."),
]
Data = Annotated[
    str,
    typer.Option(metavar="SOURCE", help="Requests as JSON lines, atlas:train …, or counterfact:FILE, zsre:FILE …"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …; map spreads the model over all there are.")]
DTYPES = ("float32", "bfloat16", "float16")
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by default float32 on the CPU, else as stored.")
]
Quantise = Annotated[str | None, typer.Option(help="bnb-4bit, bnb-8bit or torchao-int8: weights in fewer bits.")]
Preset = Annotated[str, typer.Option(help="paper or default: the editor network and how it is trained.")]
Modules = Annotated[
    list[str] | None, typer.Option(help="Globs of the matrices to edit, or re:expressions; else the MLPs'.")
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="BLOCKS",
        help="Blocks to edit: last-3, 12-14, 0.6-0.8 of the depth; without it, last-3 or all that --modules name.",
    ),
]
EditLayers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="BLOCKS",
        help="Blocks to edit, for editors without training: 10, 4-8, 0.3-0.4 of the depth (remend doctor shows where).",
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(min=0, help="GB that training may take, the model included; micro-batches are made to fit."),
]
MicroBatch = Annotated[int | None, typer.Option(min=1, help="Episodes that go through the edited model together.")]
CacheGb = Annotated[float, typer.Option(min=0, help="GB of memory for what is computed once for each example.")]
CacheFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Keep it on disk too, for this run and later ones.")
]
Precision = Annotated[Literal["float32", "tf32", "bfloat16"], typer.Option(help="Of matrix products while training.")]
Recompute = Annotated[
    bool, typer.Option("--recompute", help="Compute activations again for the backward pass; less memory, more time.")
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
Seed = Annotated[int, typer.Option(help="Of every random draw.")]
EditorFolder = Annotated[
    str | None,
    typer.Option(
        "--editor",
        metavar="DIR|NAME",
        help="A trained editor's folder, or an editor that needs no training: "
        + ", ".join(entry.name + (" (--statistics)" if entry.needs == "text" else "") for entry in _untrained())
        + f". By default {DEFAULT_EDITOR}, or what can edit the model, where it has no editor of its own. "
        "A folder that is called like one is ./NAME.",
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Plain text on which fit, ridge, rome, memit or lookup measures the model."),
]


def _help_on_settings(context: typer.Context, assignments: list[str] | None) -> list[str] | None:
    """Print the settings of the editor and exit, if the user wrote ``--set help``."""
    # A callback, since it runs before click asks for options that are missing.
    if "help" in (assignments or ()):
        from remend.editors import editor_class

        _print_settings(editor_class(context.params.get("editor") or DEFAULT_EDITOR))
        raise typer.Exit
    return assignments


EditorSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        callback=_help_on_settings,
        help="A setting of the editor, once for each; --editor NAME --set help lists them all.",
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="The prompt is a user's message: ask it through the model's chat template.")
]
PairFlag = Annotated[
    bool, typer.Option("--pair", help="Each two --prompt are one pair of texts, for a classifier that compares them.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="The longest answer that is decoded, in tokens.")]


class Trust(NamedTuple):
    """The arguments of :func:`remend.load` that say what of a model's files is trusted."""

    trust_remote_code: bool = False
    use_safetensors: bool = True


TRUST: ContextVar[Trust] = ContextVar("TRUST", default=Trust())  # noqa: B039
"""What the options before the command say."""

MIN_VALIDATION_SHARE = 0.5
"""The smallest share of successful edits, and of other answers kept, with which an editor does more good than harm."""


def process_rank() -> int:
    """Return this process's rank among those that ``accelerate launch`` or ``torchrun`` started; rank 0 prints."""
    return int(os.environ.get("RANK", "0"))


def parse_prompts(prompts: Sequence[str], chat: bool, pair: bool) -> list[Prompt]:
    """Return the prompts of a command line as texts, conversations of one message, or pairs of texts.

    Raises:
        RequestError: a prompt is empty, a pair has only one text, or both --chat and --pair are given.
    """
    from remend.errors import RequestError
    from remend.request import Chat, TextPair, as_prompt

    if chat and pair:
        raise RequestError("--chat is for models that answer, --pair for classifiers: give one of them")
    if pair and len(prompts) % 2:
        raise RequestError(f"--pair takes --prompt twice for each pair; there are {len(prompts)}")
    texts: list[Prompt] = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            texts.append(as_prompt(prompt))
        except ValueError as error:
            which = f"--prompt, number {number} of {len(prompts)}" if len(prompts) > 1 else "--prompt"
            raise RequestError(f"{which}: {error}") from None
    if pair:
        return [TextPair(*texts_of_pair) for texts_of_pair in zip(prompts[::2], prompts[1::2], strict=True)]
    return [Chat.of([{"role": "user", "content": prompt}]) for prompt in prompts] if chat else texts


def prompt_options(prompt: Prompt) -> str:
    """Return the command-line options that ask a prompt of this kind (see :func:`parse_prompts`)."""
    from remend.request import Chat, TextPair

    if isinstance(prompt, TextPair):
        return "--pair --prompt '…' --prompt '…'"
    return "--chat --prompt '…'" if isinstance(prompt, Chat) else "--prompt '…'"


def find_preset(name: str) -> tuple[MendConfig, TrainingConfig]:
    """Return the editor network's and the training settings of a preset.

    Raises:
        ConfigError: there is no such preset.
    """
    from remend.errors import ConfigError, nearest
    from remend.training import PRESETS

    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


def check_dtype(dtype: str | None) -> None:
    """Check the name of a dtype.

    Raises:
        ConfigError: there is no such dtype.
    """
    from remend.errors import ConfigError, nearest

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r} for weights; {nearest(dtype, DTYPES)}")


def load_model(model: str, device: str, seed: int, dtype: str | None = None, quantise: str | None = None) -> Task:
    """Load the base model, without the progress bars of transformers.

    Raises:
        ConfigError: there is no such dtype.
    """
    check_dtype(dtype)
    import torch
    from transformers.utils import logging

    from remend.tasks import load

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    return load(model, device, getattr(torch, dtype) if dtype else None, quantise, *TRUST.get())


@dataclass(frozen=True)
class EditorChoice:
    """An editor that a command line names, before there is a model.

    Attributes:
        info: its name, what it needs and what its edits are.
        make: returns it, once the model is loaded.
    """

    info: EditorInfo
    make: Callable[[Task], Editor]


def find_editor(
    editor: str | None,
    model: str,
    text: Path | None = None,
    seed: int = 0,
    settings: Sequence[str] | None = None,
    layers: str | None = None,
) -> EditorChoice:
    """Return the editor that a command line names: a trained one, or one that needs no training.

    Where none is named, it is the one that ships with the model, or :func:`remend.editors.default_editor`, which is
    printed. It warns of a trained one that did badly in training.

    Args:
        editor: a name, or a folder; what is both is the name, and ``./`` before it makes it the folder.
        model: the model's name or folder.
        text: a file of passages, for editors that measure the model's activations.
        seed: of every random draw.
        settings: of an editor that needs no training, as ``NAME=VALUE``.
        layers: the blocks that an editor without training edits.

    Raises:
        ConfigError: there is no such editor, it takes no text, or it has no such setting.
        FileError: the folder holds none.
    """
    from remend.assets import ATLAS, BUILT_IN_MODELS
    from remend.data import read_text
    from remend.editors import default_editor, editor_class, make_or_load
    from remend.errors import ConfigError

    mistyped = (
        editor is None
        and model not in BUILT_IN_MODELS
        and not os.path.isdir(model)
        and get_close_matches(model, [ATLAS])
    )
    if mistyped:
        raise ConfigError(
            f"there is no folder {model}; did you mean {ATLAS!r}? If it is a hub id, give --editor {DEFAULT_EDITOR}"
        )
    name = editor or (ATLAS if model == ATLAS else DEFAULT_EDITOR)
    kind = editor_class(name) if name in EDITORS else None
    if text is not None and (kind is None or "text" not in kind.info.options):
        names = [entry.name for entry in _untrained() if "text" in editor_class(entry.name).info.options]
        raise ConfigError(f"{name} takes no --statistics: {', '.join(names)} do, each by its name")
    if kind is None:
        if layers is not None:
            raise ConfigError(f"{name} was trained for blocks of its own, so it takes no --layers")
        return _from_folder(name, settings)
    if kind.info.needs == "training":
        hint = f" (--editor ./{name} is the folder of that name)" if os.path.isdir(name) else ""
        hint += f". {model} has one: --editor {ATLAS}" if (name, model) == ("mend", ATLAS) else ""
        raise ConfigError(
            f"{name} is trained for a model first: remend train {model} --method {name} --data requests.jsonl --out "
            f"DIR, then --editor DIR{hint}"
        )
    values = _parse_settings(settings or ())
    config = _configure(kind, values, seed)
    passages = read_text(text) if text is not None else ()

    def made(task: Task) -> Editor:
        if editor is not None:
            return make_or_load(name, task, passages, seed, config, layers=layers, announce=_print_statistics)
        default = default_editor(task, values)
        _print_default(default)
        return make_or_load(
            default.name, task, passages, seed, default.config, layers=layers, announce=_print_statistics
        )

    return EditorChoice(kind.info, made)


def _print_statistics(message: str) -> None:
    """Print whether what an editor needs to know of the model is measured or read."""
    Console(stderr=True).print(f"statistics of the model: {plain(message)}", soft_wrap=True, highlight=False)


def _print_default(default: DefaultEditor) -> None:
    """Print which editor is used where none was named and, if it is not the first choice, why."""
    kind = getattr(default.config, "kind", None)
    named = default.name + (f" of kind {kind}" if kind else "")
    why = f"; {DEFAULT_EDITOR} of kind units was not possible: {plain(default.reason)}" if default.reason else ""
    Console(stderr=True).print(f"editor: {named}{why}", soft_wrap=True, highlight=False)


def _from_folder(name: str, settings: Sequence[str] | None) -> EditorChoice:
    """Return the editor in a folder.

    Raises:
        ConfigError: there is no such folder, or settings are given.
        FileError: the folder holds no editor.
    """
    from remend.assets import ATLAS
    from remend.editors import editor_class, load_editor
    from remend.editors.loading import RENAMED
    from remend.errors import ConfigError

    missing = name != ATLAS and not os.path.exists(name) and os.sep not in name
    if missing or (name in RENAMED and not os.path.exists(name)):
        editor_class(name)  # raises: there is none of that name
    if settings:
        raise ConfigError(f"{name} was saved with its settings: --set is for editors that are made anew, by their name")
    editor: Any = load_editor(name)
    if editor.info.needs != "training":
        return EditorChoice(editor.info, lambda task: editor)
    if is_unfit(editor):
        best = best_validation(editor.trained)
        Console(stderr=True).print(
            f"[yellow]warning[/]: {plain(name)} is not fit for use: in training, on requests that it had not seen, "
            f"{best['taken']:.0%} of its edits took and {best['kept']:.0%} of other answers stayed. Give it more "
            "requests or time",
            soft_wrap=True,
        )
    return EditorChoice(editor.info, lambda task: editor.to(task.device))


def _configure(kind: type[Editor], values: Mapping[str, Any], seed: int) -> Config | None:
    """Return the default configuration of an editor with other values of some settings.

    Raises:
        ConfigError: the editor has no such setting, or the value is not allowed.
    """
    from remend.config import from_json, to_json
    from remend.errors import ConfigError

    config: Config | None = kind.default_config(seed)
    if not values:
        return config
    if kind.config_class is None or config is None:
        raise ConfigError(f"{kind.info.name} has no settings: leave --set away")
    return from_json(kind.config_class, {**to_json(config), **values})


def _parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the settings that ``NAME=VALUE`` assignments name, with their values.

    Raises:
        ConfigError: one is no assignment.
    """
    from remend.errors import ConfigError

    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE, such as --set strength=1.5, not {assignment!r}")
        try:
            values[name.strip()] = json.loads(value)  # numbers, true, false and null
        except ValueError:
            values[name.strip()] = value.strip()
    return values


def _print_settings(kind: type[Editor]) -> None:
    """Print the settings of an editor with their defaults and meaning."""
    from remend.config import settings as describe_settings

    console, config = Console(), kind.default_config()
    console.print(f"{kind.info.name} has " + ("these settings:" if kind.config_class else "no settings"))
    if kind.config_class is None:
        return
    for setting in describe_settings(kind.config_class):
        default = json.dumps(getattr(config, setting.name))
        console.print(
            f"[bold]{setting.name}[/]={plain(default)}  {plain(setting.help)} ({plain(setting.allowed)})",
            soft_wrap=True,
        )


def best_validation(trained: Mapping[str, Any]) -> dict[str, float]:
    """Return the validation result of the state that a training run kept."""
    best: dict[str, float] = min(trained["history"], key=lambda entry: entry["loss"])
    return best


def is_unfit(editor: TrainableEditor) -> bool:
    """Return whether an editor's validation shows that most edits failed or most unrelated answers changed."""
    if not editor.trained.get("history"):
        return False  # it was saved by hand, without a training run
    best = best_validation(editor.trained)
    return min(best["taken"], best["kept"]) < MIN_VALIDATION_SHARE
