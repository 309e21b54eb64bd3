"""Where cells are computed: trained editors and results are kept, so that a stopped run goes on."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from remend.config import differences, to_json
from remend.core.layers import editable_layers, execution_device
from remend.editors import TRAINED, Editor, Trainable, load_trained, make
from remend.editors.finetune import FineTune
from remend.errors import ConfigError, FileError, ModelError, RemendError
from remend.evaluation import evaluate
from remend.evaluation.reports.report import environment, metrics_of
from remend.models.blocks import find_stacks, select_blocks
from remend.models.structure import DEFAULT_LAYERS, DEFAULT_LAYERS_ENCODER_DECODER, mlp_layer_names
from remend.request import EditRequest
from remend.serialization import MANIFEST, write_json
from remend.training import train

from .cells import (
    METHODS,
    SAME_TRAINING,
    Cell,
    Progress,
    Scale,
    settings_of,
    training_of,
)
from .worlds import TOKENS, Inhabited, World, remembered

KEPT = (
    "reliability", "generality", "edit_success", "locality_far", "locality_near", "accuracy_drawdown",
    "perplexity_drawdown",
)  # fmt: skip
"""What is kept of each cell's measurement, beside :data:`TOKENS`."""


class Workshop:
    """Computes cells and keeps what it found in a folder.

    Args:
        folder: where.
        worlds: the models; others whose results the folder holds are there too, but cannot be computed on.
        scale: how much is computed; a folder belongs to one scale.
        device: of the models, as for :func:`remend.load`.
        on_progress: is told what is being done.

    Raises:
        ConfigError: the folder holds results of another scale.
    """

    def __init__(
        self,
        folder: Path,
        worlds: Mapping[str, World],
        scale: Scale,
        device: str = "auto",
        on_progress: Progress = lambda what: None,
    ) -> None:
        self.folder, self.scale, self.device, self.on_progress = folder, scale, device, on_progress
        kept = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("worlds/*.json")}
        self.worlds = {**remembered(kept), **worlds}
        self._inhabited: dict[str, Inhabited] = {}
        self._checked: set[str] = set()
        about = folder / "about.json"
        described = asdict(replace(scale, seeds=0, memory=[]))  # more seeds, or widths, go on with what is there
        if about.exists() and json.loads(about.read_text(encoding="utf-8")) != described:
            raise ConfigError(
                f"{folder} holds results of another size of run (with --quick or without): choose another folder for "
                "this one, or give the same"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(about, described)

    def found(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured of a cell, if it was; or, under ``failed``, why it could not be.

        Raises:
            ConfigError: that was of another world of that name, or with other settings.
        """
        self._check_world(cell.world)
        file = self._file(cell)
        if not file.exists():
            return None
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        now = settings_of(cell, self.scale)
        if other := differences(kept.get("settings", now), now):  # a release that kept none had these
            raise ConfigError(
                f"{file} was computed with another {', '.join(other)}: delete it to compute {cell.id} anew, or choose "
                "another folder"
            )
        return kept

    def compute(self, cells: Iterable[Cell], again: bool = False) -> None:
        """Measure each cell that was not yet. One that fails is kept as failed, so that the others can be had.

        Args:
            cells: which.
            again: whether to try once more what failed before.

        Raises:
            ConfigError: as :meth:`found` and :meth:`home`.
            FileError: something cannot be written, or a kept editor is damaged.
        """
        for cell in cells:
            kept = self.found(cell)
            if kept is None or (again and "failed" in kept):
                self.home(cell.world)  # what fails here is no matter of the cell
                write_json(self._file(cell), self._measured(cell))

    def _measured(self, cell: Cell) -> dict[str, Any]:
        """A cell's figures, or why there are none."""
        try:
            return self.measure(cell)
        except (ConfigError, FileError):  # a person has to set these right
            raise
        except RemendError as error:
            failed = f"{type(error).__name__}: {error}"
            return {"cell": cell.id, "failed": failed, "settings": settings_of(cell, self.scale)}

    def measure(self, cell: Cell) -> dict[str, Any]:
        """One cell's figures: the mean and the number of edits of each metric, and what it took."""
        home = self.home(cell.world)
        self.on_progress(f"{cell.id}: editor")
        began = time.perf_counter()
        editor = self.editor(cell)
        ready = time.perf_counter()
        self.on_progress(f"{cell.id}: edits")
        wanted = self.scale.requests if cell.edits == 1 else max(self.scale.many, cell.edits)
        every = home.requests("test")
        requests = random.Random(f"{cell.world} {cell.seed}").sample(every, min(wanted, len(every)))
        batched: dict[str, Any] = {} if cell.edits == 1 else {"protocol": "batched", "edits": [cell.edits]}
        text = home.passages("text")
        report = evaluate(
            home.model, home.tokenizer, editor, requests, max_new_tokens=home.world.new_tokens,
            baselines=False, text=text, text_tokens=self.scale.text_tokens, **batched,
        )  # fmt: skip
        measured = metrics_of(report.runs[0].cases)
        figures = {}
        for name in KEPT:
            for mode in ("generated", "value"):
                if mode in measured.get(name, {}):
                    figures[name] = {"mean": measured[name][mode].mean, "n": measured[name][mode].n}
        if tokens := measured.get("edit_success", {}).get("token_accuracy"):
            figures[TOKENS] = {"mean": tokens.mean, "n": tokens.n}
        return {
            "cell": cell.id,
            "figures": figures,
            "perplexity": report.text.get("perplexity"),
            "editor_seconds": round(ready - began, 1),
            "seconds": round(time.perf_counter() - began, 1),
            "environment": environment(execution_device(home.model)),
            "settings": settings_of(cell, self.scale),
        }

    def home(self, name: str) -> Inhabited:
        """A world, loaded once.

        Raises:
            ConfigError: there is none of that name, it is not at hand, or the folder holds results of another one.
        """
        if name not in self.worlds:
            raise ConfigError(f"there is no world {name!r} here; there are {', '.join(self.worlds)}")
        if not self.worlds[name].at_hand:
            raise ConfigError(
                f"{self.folder} holds results of {name}, but the model is not at hand: give what they were computed "
                "with (--writer and --text, or --world)"
            )
        self._check_world(name)
        if name not in self._inhabited:
            self._inhabited[name] = Inhabited(self.worlds[name], self.folder, self.device)
        return self._inhabited[name]

    def _check_world(self, name: str) -> None:
        """Keep what a given world is when it is first met, so that another one of its name is refused.

        Raises:
            ConfigError: the folder holds results of another one.
        """
        if name in self._checked or name not in self.worlds or not (now := self.worlds[name].identity()):
            return
        file = self.folder / "worlds" / f"{name}.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else now
        if other := differences(before, now):
            raise ConfigError(
                f"{self.folder} holds results of {name} with another {', '.join(other)}: choose another folder for "
                "this one"
            )
        write_json(file, now)
        self._checked.add(name)

    # -- editors -------------------------------------------------------------------------------------------------

    def editor(self, cell: Cell) -> Editor:
        """The editor of a cell, trained if need be.

        Raises:
            ConfigError: as :meth:`trained`.
        """
        home, method = self.home(cell.world), METHODS[cell.method]
        if method.keeps:
            locality = home.requests("train")[: 10 * self.scale.requests]
            return FineTune.for_model(home.model, replace(method.config, seed=cell.seed), locality=locality)
        if method.training is None:
            text = home.sentences() if method.reads else ()
            return make(method.editor, home.model, home.tokenizer, text, cell.seed, method.config)
        found: Any = self.trained(replace(cell, method=SAME_TRAINING.get(cell.method, cell.method)))
        found.config = method.config
        editor: Editor = found
        return editor

    def trained(self, cell: Cell) -> Trainable:
        """The trained editor of a cell; kept, so that each is trained once.

        Raises:
            ConfigError: the one that is kept has other settings.
        """
        out = self.folder / "editors" / f"{cell.world}-{cell.method}-{cell.seed}"
        home, method = self.home(cell.world), METHODS[cell.method]
        config = training_of(cell, self.scale)
        assert config is not None
        unfinished = out.with_name(f"{out.name}.checkpoints")
        if (out / MANIFEST).exists() and not unfinished.exists():
            kept = load_trained(out)
            now = {"config": to_json(method.config), "training": to_json(config)}
            if other := differences({"config": to_json(kept.config), "training": kept.trained["config"]}, now):
                raise ConfigError(
                    f"{out} was trained with another {', '.join(other)}: delete it to train it anew, or choose another "
                    "folder"
                )
            return kept.to(execution_device(home.model))
        matrices = attention_matrices(home.model) if method.attention else ()
        editor = TRAINED[method.editor].for_model(home.model, method.config, matrices, cell.seed)
        self.on_progress(f"{cell.id}: training")
        return train(
            home.model, home.tokenizer, *self._requests(home),
            config=config, editor=editor, out=out, resume=unfinished.exists(),
            on_progress=lambda p: self.on_progress(f"{cell.id}: training {p.share:.0%}"),
        )  # fmt: skip

    def _requests(self, home: Inhabited) -> tuple[list[EditRequest], list[EditRequest]]:
        """What an editor is trained and validated on."""
        draw, most = random.Random(f"{home.world.name} training"), self.scale.train
        train, validation = home.requests("train"), home.requests("validation")
        return (
            train if len(train) <= most else draw.sample(train, most),
            validation if len(validation) <= most // 10 else draw.sample(validation, most // 10),
        )

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.id.replace('/', '-')}.json"


def attention_matrices(model: PreTrainedModel) -> list[str]:
    """The names of self-attention's matrices in the last blocks: what is linear there beside the MLPs (Table 9).

    An encoder's blocks have no cross-attention, so of an encoder-decoder it is what blocks of both have.

    Raises:
        ModelError: there is no stack of blocks, or nothing beside the MLPs.
    """
    blocks = select_blocks(model, DEFAULT_LAYERS if len(find_stacks(model)) == 1 else DEFAULT_LAYERS_ENCODER_DECODER)
    beside = {
        prefix: {name.removeprefix(prefix) for name, _ in editable_layers(block, prefix)}
        - {name.removeprefix(prefix) for name in mlp_layer_names(prefix, block)}
        for prefix, block in blocks
    }
    everywhere = set.intersection(*beside.values())
    if not everywhere:
        raise ModelError(f"{type(model).__name__}: its blocks have no linear layers beside their MLPs")
    return [f"{prefix}{name}" for prefix in beside for name in sorted(everywhere)]
