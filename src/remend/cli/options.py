"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from remend.cli.escaping import plain

if TYPE_CHECKING:
    from remend.editors import Editor, EditorInfo, MendConfig, Trainable
    from remend.request import Prompt
    from remend.tasks import Task
    from remend.training import TrainingConfig

Model = Annotated[
    str, typer.Argument(help="'atlas', 'questions', 'claims' (ship with remend), a local folder, or a hub id.")
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
        help="A trained editor, or one that needs no training: ridge (the default where a model has none), finetune, "
        "finetune-local, and with --statistics rome and memit (remend evaluate takes cache and in-context, too). A "
        "folder that is called like one of these is ./NAME.",
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Plain text on which ridge, rome, memit or cache measures what the model reads."),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="The prompt is a user's message: ask it through the model's chat template.")
]
PairFlag = Annotated[
    bool, typer.Option("--pair", help="Each two --prompt are one pair of texts, for a classifier that compares them.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="The longest answer that is decoded, in tokens.")]


DOUBTFUL = 0.5
"""Below this share of edits taken, or of other answers kept, on validation, an editor does more harm than good."""


def process() -> int:
    """This process's number among those that ``accelerate launch`` or ``torchrun`` started; the first one speaks."""
    return int(os.environ.get("RANK", "0"))


def asked(prompts: Sequence[str], chat: bool, pair: bool) -> list[Prompt]:
    """What prompts on the command line ask: texts, conversations of one message, or pairs of texts.

    Raises:
        RequestError: one is empty, a pair is of one text, or both are wanted.
    """
    from remend.errors import RequestError
    from remend.request import Chat, TextPair, as_prompt

    if chat and pair:
        raise RequestError("--chat is for models that answer, --pair for classifiers: give one of them")
    if pair and len(prompts) % 2:
        raise RequestError(f"--pair takes --prompt twice for each pair; there are {len(prompts)}")
    try:
        texts = [as_prompt(prompt) for prompt in prompts]
    except ValueError as error:
        raise RequestError(f"--prompt: {error}") from None
    if pair:
        return [TextPair(*both) for both in zip(prompts[::2], prompts[1::2], strict=True)]
    return [Chat.of([{"role": "user", "content": prompt}]) for prompt in prompts] if chat else texts


def asking(prompt: Prompt) -> str:
    """The options that ask something like ``prompt``: what :func:`asked` reads."""
    from remend.request import Chat, TextPair

    if isinstance(prompt, TextPair):
        return "--pair --prompt '…' --prompt '…'"
    return "--chat --prompt '…'" if isinstance(prompt, Chat) else "--prompt '…'"


def preset(name: str) -> tuple[MendConfig, TrainingConfig]:
    """Network and training settings of a preset.

    Raises:
        ConfigError: there is no such preset.
    """
    from remend.errors import ConfigError, nearest
    from remend.training import PRESETS

    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


def known_dtype(dtype: str | None) -> str | None:
    """``dtype``, if it is one.

    Raises:
        ConfigError: it is none.
    """
    from remend.errors import ConfigError, nearest

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r} for weights; {nearest(dtype, DTYPES)}")
    return dtype


def load_model(model: str, device: str, seed: int, dtype: str | None = None, quantise: str | None = None) -> Task:
    """Load the base model without the progress bars of the libraries below.

    Raises:
        ConfigError: there is no such dtype.
    """
    known_dtype(dtype)
    import torch
    from transformers.utils import logging

    from remend.tasks import load

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    return load(model, device, getattr(torch, dtype) if dtype else None, quantise)


RIDGE = "ridge"
"""The editor for a model that none was trained for."""


@dataclass(frozen=True)
class Chosen:
    """An editor that a command line names, before there is a model.

    Attributes:
        traits: what it says of itself.
        make: gives it, once the model is loaded.
    """

    traits: EditorInfo
    make: Callable[[Task], Editor]


def find_editor(editor: str | None, model: str, text: Path | None = None, seed: int = 0) -> Chosen:
    """The editor that is named: a trained one, one that needs no training, or the atlas's own.

    Where none is named and the model has none of its own, it is :data:`RIDGE`. A trained one that did badly in training
    is warned of.

    Args:
        editor: a name, or a folder; what is both is the name, and ``./`` before it makes it the folder.
        model: what it is for.
        text: passages, for those that measure what the model reads.
        seed: of whatever is drawn.

    Raises:
        ConfigError: there is no such editor, or it takes no text.
        FileError: the folder holds none.
    """
    from remend.assets import ATLAS, ATLAS_FOLDER, BUILT_IN_MODELS
    from remend.data import read_text
    from remend.editors import EDITORS, TRAINED, UNTRAINED, load_editor, make
    from remend.errors import ConfigError, nearest

    mistyped = (
        editor is None
        and model not in BUILT_IN_MODELS
        and not os.path.isdir(model)
        and get_close_matches(model, [ATLAS])
    )
    if mistyped:
        raise ConfigError(
            f"there is no folder {model}; did you mean {ATLAS!r}? If it is a hub id, give --editor {RIDGE}"
        )
    name = editor or (ATLAS if model == ATLAS else RIDGE)
    measuring = [own for own, kind in UNTRAINED.items() if "text" in signature(kind.create).parameters]
    if text is not None and name not in measuring:
        raise ConfigError(f"{name} takes no --statistics: {', '.join(measuring)} do, each by its name")
    if name in UNTRAINED:
        passages = read_text(text) if text is not None else ()
        return Chosen(UNTRAINED[name].traits, lambda task: make(name, task, passages, seed))
    if name in EDITORS:
        there = f" (--editor ./{name} is the folder of that name)" if os.path.isdir(name) else ""
        there += f". {model} has one: --editor {ATLAS}" if (name, model) == ("mend", ATLAS) else ""
        raise ConfigError(
            f"{name} is trained for a model first: remend train {model} --method {name} --data requests.jsonl --out "
            f"DIR, then --editor DIR{there}"
        )
    if name != ATLAS and not os.path.exists(name) and os.sep not in name:
        raise ConfigError(f"there is no editor {name!r}, nor a folder of that name; {nearest(name, EDITORS)}")
    found: Any = load_editor(ATLAS_FOLDER / "editor" if name == ATLAS else name)
    if found.traits.name not in TRAINED:
        return Chosen(found.traits, lambda task: found)
    if unfit(found):
        best = best_of(found.trained)
        Console(stderr=True).print(
            f"[yellow]warning[/]: {plain(name)} is not fit for use: in training, on requests that it had not seen, "
            f"{best['taken']:.0%} of its edits took and {best['kept']:.0%} of other answers stayed. Give it more "
            "requests or time",
            soft_wrap=True,
        )
    return Chosen(found.traits, lambda task: found.to(task.device))


def best_of(trained: Mapping[str, Any]) -> dict[str, float]:
    """The validation of the state that a training run kept."""
    best: dict[str, float] = min(trained["history"], key=lambda entry: entry["loss"])
    return best


def unfit(editor: Trainable) -> bool:
    """Whether most edits of an editor did not take, or most unrelated answers changed, when it was validated."""
    if not editor.trained.get("history"):
        return False  # it was saved by hand
    best = best_of(editor.trained)
    return min(best["taken"], best["kept"]) < DOUBTFUL
