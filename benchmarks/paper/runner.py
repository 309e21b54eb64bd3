"""Computing cells: make or train the editor, evaluate it on test requests, store the figures."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from remend.config import differences, to_json
from remend.core.layers import editable_layers, execution_device
from remend.editors import Editor, Mend, TrainableEditor, load_trained, make, trainable_class
from remend.editors.finetune import FineTune
from remend.errors import ConfigError, FileError, ModelError, RemendError
from remend.evaluation import evaluate
from remend.evaluation.reports.report import environment, metrics_of
from remend.models.blocks import find_stacks, select_blocks
from remend.models.editable_matrices import DEFAULT_LAYERS, DEFAULT_LAYERS_ENCODER_DECODER, mlp_layer_names
from remend.request import EditRequest
from remend.saved_folders import MANIFEST
from remend.training import train

from .cell_definitions import Cell, cell_settings, current_json, training_config
from .methods import METHODS, SAME_TRAINING
from .result_folder import ResultFolder
from .testbeds import TOKEN_SUCCESS, LoadedTestbed

STORED_METRICS = (
    "reliability", "generality", "edit_success", "locality_far", "locality_near", "accuracy_drawdown",
    "perplexity_drawdown",
)  # fmt: skip
"""The metrics that are stored of each cell, beside :data:`TOKEN_SUCCESS`."""


class CellRunner:
    """Computes cells and stores their figures, and the editors that it trains, in a folder.

    Args:
        results: the folder.
        device: of the models, as for :func:`remend.load`.
        on_progress: called with a short text at each stage.
    """

    def __init__(
        self, results: ResultFolder, device: str = "auto", on_progress: Callable[[str], None] = lambda what: None
    ) -> None:
        self.results, self.device, self.on_progress = results, device, on_progress
        self.scale = results.scale
        self._loaded: dict[str, LoadedTestbed] = {}

    def compute(self, cells: Iterable[Cell], retry_failed: bool = False) -> None:
        """Measure each cell that has no result. If one fails, store why, and go on with the others.

        Args:
            cells: which.
            retry_failed: whether to compute cells again that failed before.

        Raises:
            ConfigError: as :meth:`ResultFolder.read` and :meth:`testbed`.
            FileError: a file cannot be written, or a stored editor is damaged.
        """
        for cell in cells:
            result = self.results.read(cell)
            if result is None or (retry_failed and "failed" in result):
                # Outside of the try block below: a testbed that cannot be loaded stops the run, not only this cell.
                self.testbed(cell.testbed)
                self.results.write(cell, self._measure_or_failure(cell))

    def _measure_or_failure(self, cell: Cell) -> dict[str, Any]:
        try:
            return self.measure(cell)
        except (ConfigError, FileError):  # the user has to correct these; they say nothing about the editor
            raise
        except RemendError as error:
            reason = f"{type(error).__name__}: {error}"
            return {"cell": cell.id, "failed": reason, "settings": cell_settings(cell, self.scale)}

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return a cell's figures: the mean and the number of edits of each metric, the time and the environment."""
        testbed = self.testbed(cell.testbed)
        self.on_progress(f"{cell.id}: editor")
        start = time.perf_counter()
        editor = self.editor(cell)
        editor_ready = time.perf_counter()
        self.on_progress(f"{cell.id}: edits")
        count = self.scale.requests if cell.edits == 1 else max(self.scale.many, cell.edits)
        all_requests = testbed.requests("test")
        # Drawn by testbed and seed alone, so that all methods are compared on the same requests.
        requests = random.Random(f"{cell.testbed} {cell.seed}").sample(all_requests, min(count, len(all_requests)))
        batched: dict[str, Any] = {} if cell.edits == 1 else {"protocol": "batched", "edits": [cell.edits]}
        text = testbed.passages("text")
        report = evaluate(
            testbed.task, editor, requests, max_new_tokens=testbed.testbed.new_tokens,
            baselines=False, text=text, text_tokens=self.scale.text_tokens if text else 0, **batched,
        )  # fmt: skip
        metrics = metrics_of(report.runs[0].cases)
        figures = {}
        for name in STORED_METRICS:
            for mode in ("generated", "value"):
                if mode in metrics.get(name, {}):
                    figures[name] = {"mean": metrics[name][mode].mean, "n": metrics[name][mode].n}
        if tokens := metrics.get("edit_success", {}).get("token_accuracy"):
            figures[TOKEN_SUCCESS] = {"mean": tokens.mean, "n": tokens.n}
        return {
            "cell": cell.id,
            "figures": figures,
            "perplexity": report.text.get("perplexity"),
            "editor_seconds": round(editor_ready - start, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "environment": environment(execution_device(testbed.task.model)),
            "settings": cell_settings(cell, self.scale),
        }

    def testbed(self, name: str) -> LoadedTestbed:
        """Return a testbed, loaded once.

        Raises:
            ConfigError: there is none of that name, only its results are there, or the folder holds results of another
                testbed of that name.
        """
        testbeds = self.results.testbeds
        if name not in testbeds:
            raise ConfigError(f"there is no testbed {name!r} here; there are {', '.join(testbeds)}")
        if not testbeds[name].available:
            raise ConfigError(
                f"{self.results.folder} holds results of {name}, but the model is not at hand: give what they were "
                "computed with (--writer and --text, or --testbed)"
            )
        self.results.check_testbed(name)
        if name not in self._loaded:
            self._loaded[name] = LoadedTestbed(testbeds[name], self.results.folder, self.device)
        return self._loaded[name]

    def editor(self, cell: Cell) -> Editor:
        """Return the editor of a cell, trained if its method is.

        Raises:
            ConfigError: as :meth:`trained_editor`.
        """
        testbed, method = self.testbed(cell.testbed), METHODS[cell.method]
        if method.uses_locality:
            locality = testbed.requests("train")[: 10 * self.scale.requests]
            return FineTune.create(testbed.task, replace(method.config, seed=cell.seed), locality=locality)
        if method.training is None:
            text = testbed.sentences() if method.uses_text else ()
            return make(method.editor, testbed.task, text, cell.seed, method.config)
        trained = self.trained_editor(replace(cell, method=SAME_TRAINING.get(cell.method, cell.method)))
        settings = {name: value for name, value in vars(method.config).items() if vars(trained.config)[name] != value}
        return trained.with_settings(**settings) if isinstance(trained, Mend) and settings else trained

    def trained_editor(self, cell: Cell) -> TrainableEditor:
        """Return the trained editor of a cell; it is trained once and stored.

        Raises:
            ConfigError: the stored one has other settings.
        """
        out = self.results.folder / "editors" / f"{cell.testbed}-{cell.method}-{cell.seed}"
        testbed, method = self.testbed(cell.testbed), METHODS[cell.method]
        config = training_config(cell, self.scale)
        assert config is not None
        checkpoints = out.with_name(f"{out.name}.checkpoints")  # there as long as training has not ended
        if (out / MANIFEST).exists() and not checkpoints.exists():
            stored = load_trained(out)
            before = {"config": to_json(stored.config), "training": current_json(config, stored.trained["config"])}
            if changed := differences(before, {"config": to_json(method.config), "training": to_json(config)}):
                raise ConfigError(
                    f"{out} was trained with another {', '.join(changed)}: delete it to train it anew, or choose "
                    "another folder"
                )
            return stored.to(execution_device(testbed.task.model))
        matrices = attention_matrices(testbed.task.model) if method.attention else ()
        editor = trainable_class(method.editor).create(testbed.task, method.config, modules=matrices, seed=cell.seed)
        self.on_progress(f"{cell.id}: training")
        return train(
            testbed.task, *self._training_requests(testbed),
            config=config, editor=editor, out=out, resume=checkpoints.exists(),
            on_progress=lambda progress: self.on_progress(f"{cell.id}: training {progress.share:.0%}"),
        )  # fmt: skip

    def _training_requests(self, testbed: LoadedTestbed) -> tuple[list[EditRequest], list[EditRequest]]:
        """Return the requests to train and to validate on."""
        draw, limit = random.Random(f"{testbed.testbed.name} training"), self.scale.train
        train_split, validation = testbed.requests("train"), testbed.requests("validation")
        return (
            train_split if len(train_split) <= limit else draw.sample(train_split, limit),
            validation if len(validation) <= limit // 10 else draw.sample(validation, limit // 10),
        )


def attention_matrices(model: PreTrainedModel) -> list[str]:
    """Return the names of the self-attention matrices in the last blocks (Table 9).

    They are the linear layers beside the MLPs that every block has. In an encoder-decoder that leaves cross-attention
    out, because the encoder's blocks have none.

    Raises:
        ModelError: there is no stack of blocks, or no linear layer beside the MLPs.
    """
    blocks = select_blocks(model, DEFAULT_LAYERS if len(find_stacks(model)) == 1 else DEFAULT_LAYERS_ENCODER_DECODER)
    outside_mlp = {
        prefix: {name.removeprefix(prefix) for name, _ in editable_layers(block, prefix)}
        - {name.removeprefix(prefix) for name in mlp_layer_names(prefix, block)}
        for prefix, block in blocks
    }
    in_every_block = set.intersection(*outside_mlp.values())
    if not in_every_block:
        raise ModelError(f"{type(model).__name__}: its blocks have no linear layers beside their MLPs")
    return [f"{prefix}{name}" for prefix in outside_mlp for name in sorted(in_every_block)]
