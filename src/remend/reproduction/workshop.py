"""Where cells are computed: trained editors and results are kept, so that a stopped run goes on."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from remend.editors import EDITORS, TRAINED, Editor, Trainable, load_trained, make
from remend.editors.finetune import FineTune, FineTuneConfig
from remend.errors import ConfigError
from remend.evaluation import evaluate
from remend.evaluation.report import environment, metrics_of
from remend.reproduction.cells import GATE, METHODS, SAME_TRAINING, Cell, Progress, Scale
from remend.reproduction.worlds import Inhabited, World
from remend.request import EditRequest
from remend.storage import MANIFEST, write_json
from remend.training import train

KEPT = (
    "reliability", "generality", "edit_success", "locality_far", "locality_near", "accuracy_drawdown",
    "perplexity_drawdown",
)  # fmt: skip
"""What is kept of each cell's measurement."""


class Workshop:
    """Computes cells and keeps what it found in a folder.

    Args:
        folder: where.
        worlds: the models.
        scale: how much is computed; a folder belongs to one scale.
        on_progress: is told what is being done.

    Raises:
        ConfigError: the folder holds results of another scale.
    """

    def __init__(
        self, folder: Path, worlds: Mapping[str, World], scale: Scale, on_progress: Progress = lambda what: None
    ) -> None:
        self.folder, self.worlds, self.scale, self.on_progress = folder, worlds, scale, on_progress
        self._inhabited: dict[str, Inhabited] = {}
        about = folder / "about.json"
        described = asdict(replace(scale, seeds=0, memory=[]))  # more seeds, or widths, go on with what is there
        if about.exists() and json.loads(about.read_text(encoding="utf-8")) != described:
            raise ConfigError(f"{folder} holds results of another size of run: choose another folder for this one")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(about, described)

    def found(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured of a cell, if it was."""
        file = self._file(cell)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def compute(self, cells: Iterable[Cell]) -> None:
        """Measure each cell that was not yet."""
        for cell in cells:
            if self.found(cell) is None:
                write_json(self._file(cell), self.measure(cell))

    def measure(self, cell: Cell) -> dict[str, Any]:
        """One cell's figures: the mean and the number of edits of each metric, and what it took."""
        home = self.home(cell.world)
        self.on_progress(f"{cell.id}: editor")
        began = time.perf_counter()
        editor = self.editor(cell)
        ready = time.perf_counter()
        self.on_progress(f"{cell.id}: edits")
        wanted = self.scale.requests if cell.edits == 1 else self.scale.many
        every = home.requests("test")
        requests = random.Random(f"{cell.world} {cell.seed}").sample(every, min(wanted, len(every)))
        batched: dict[str, Any] = {} if cell.edits == 1 else {"protocol": "batched", "edits": [cell.edits]}
        text = home.passages("text")
        report = evaluate(
            home.model, home.tokenizer, editor, requests,
            baselines=False, text=text, text_tokens=self.scale.text_tokens, **batched,
        )  # fmt: skip
        measured = metrics_of(report.runs[0].cases)
        figures = {}
        for name in KEPT:
            for mode in ("generated", "value"):
                if mode in measured.get(name, {}):
                    figures[name] = {"mean": measured[name][mode].mean, "n": measured[name][mode].n}
        return {
            "cell": cell.id,
            "figures": figures,
            "perplexity": report.text.get("perplexity"),
            "editor_seconds": round(ready - began, 1),
            "seconds": round(time.perf_counter() - began, 1),
            "environment": environment(report_device(home)),
        }

    def home(self, name: str) -> Inhabited:
        """A world, loaded once.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self.worlds:
            raise ConfigError(f"there is no world {name!r} here; there are {', '.join(self.worlds)}")
        if name not in self._inhabited:
            self._inhabited[name] = Inhabited(self.worlds[name], self.folder)
        return self._inhabited[name]

    # -- editors -------------------------------------------------------------------------------------------------

    def editor(self, cell: Cell) -> Editor:
        """The editor of a cell, trained if need be."""
        home, method = self.home(cell.world), METHODS[cell.method]
        if method.keeps:
            locality = home.requests("train")[: 10 * self.scale.requests]
            return FineTune.for_model(home.model, FineTuneConfig(kl_weight=1.0, seed=cell.seed), locality=locality)
        if method.training is None:
            text = home.sentences() if EDITORS[method.editor].traits.needs == "text" else ()
            return make(method.editor, home.model, home.tokenizer, text, cell.seed, method.config)
        found: Any = self.trained(cell)
        if cell.method in SAME_TRAINING:
            found.config = replace(
                found.config, aggregate="sum" if cell.method == "mend-sum" else "least-squares",
                gate=GATE if cell.method == "mend-gate" else 0.0,
            )  # fmt: skip
        editor: Editor = found
        return editor

    def trained(self, cell: Cell) -> Trainable:
        """The trained editor of a cell; kept, so that each is trained once."""
        name = SAME_TRAINING.get(cell.method, cell.method)
        out = self.folder / "editors" / f"{cell.world}-{name}-{cell.seed}"
        home, method = self.home(cell.world), METHODS[name]
        assert method.training is not None
        unfinished = out.with_name(f"{out.name}.checkpoints")
        if (out / MANIFEST).exists() and not unfinished.exists():
            return load_trained(out)
        config = method.training
        steps = min(config.max_steps, self.scale.steps)
        config = replace(config, seed=cell.seed, max_steps=steps, patience=steps, validate_every=max(1, steps // 6))
        layers = "last-2" if home.model.config.is_encoder_decoder else "last-3"
        where: dict[str, Any] = {"modules": home.world.attention, "layers": layers} if method.attention else {}
        kind = TRAINED[method.editor]
        editor = kind.for_model(home.model, method.config, seed=cell.seed, **where)
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


def report_device(home: Inhabited) -> Any:
    """Where a world's model is."""
    return next(home.model.parameters()).device
