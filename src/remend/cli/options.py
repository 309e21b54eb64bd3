"""Options that several commands share."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from remend.editors import Mend, MendConfig
    from remend.request import Prompt
    from remend.training import TrainingConfig

Model = Annotated[str, typer.Argument(help="'atlas', 'questions' (ship with remend), a local folder, or a hub id.")]
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
    typer.Option(metavar="BLOCKS", help="Blocks to edit: last-3 (the default), 12-14, 0.6-0.8 of the depth."),
]
Memory = Annotated[
    float | None,
    typer.Option(min=0, help="GB that training may take, the model included; micro-batches are made to fit."),
]
MicroBatch = Annotated[int | None, typer.Option(min=1, help="Episodes that go through the edited model together.")]
Cache = Annotated[float, typer.Option(min=0, help="GB of memory for what is computed once for each example.")]
CacheFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Keep it on disk too, for this run and later ones.")
]
Precision = Annotated[str, typer.Option(help="float32, tf32 or bfloat16: of matrix products while training.")]
Recompute = Annotated[
    bool, typer.Option("--recompute", help="Compute activations again for the backward pass; less memory, more time.")
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
Seed = Annotated[int, typer.Option(help="Of every random draw.")]
EditorFolder = Annotated[
    str | None,
    typer.Option("--editor", metavar="DIR", help="A trained editor; 'atlas' is the one that ships with remend."),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="The prompt is a user's message: ask it through the model's chat template.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="The longest answer that is decoded, in tokens.")]


def process() -> int:
    """This process's number among those that ``accelerate launch`` or ``torchrun`` started; the first one speaks."""
    return int(os.environ.get("RANK", "0"))


def asked(prompt: str, chat: bool) -> Prompt:
    """What a prompt on the command line asks: a text, or a conversation of one message.

    Raises:
        RequestError: the message is empty.
    """
    from remend.request import Chat

    return Chat.of([{"role": "user", "content": prompt}]) if chat else prompt


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


def load_model(
    model: str, device: str, seed: int, dtype: str | None = None, quantise: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model and its tokenizer, without the loading bars of the libraries below.

    Raises:
        ConfigError: there is no such dtype.
    """
    known_dtype(dtype)
    import torch
    from transformers.utils import logging

    from remend.models import load

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    return load(model, device, getattr(torch, dtype) if dtype else None, quantise)


def load_editor(editor: str | None, model: str) -> Mend:
    """The named editor, or the shipped one for the atlas.

    Raises:
        ConfigError: no editor was named and the model has none of its own.
    """
    from remend.assets import ATLAS
    from remend.editors import Mend
    from remend.errors import ConfigError

    if editor is None and model != ATLAS:
        mistyped = not os.path.isdir(model) and get_close_matches(model, [ATLAS])
        meant = f"there is no folder {model}; did you mean {ATLAS!r}? If it is a hub id: " if mistyped else ""
        raise ConfigError(
            f"{meant}which editor? Train one for this model: remend train {model} --data requests.jsonl --out editor, "
            "then give --editor editor"
        )
    return Mend.from_pretrained(editor or ATLAS)
