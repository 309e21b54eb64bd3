"""The time and memory of a training episode, and how far they are from those of its matrix products alone.

    python benchmarks/training_speed.py [--config FILE] [--out result.json]

A random model of distilGPT-2's size, six matrices, the paper's rank of 1920. One thread, CPU seconds of the process;
medians over some steps. For each batch size:

``first``: a step with new examples only, for which all activations are computed;
``warm``: the same step again, as in a later epoch: hidden states and gradient factors come from the cache;
``floor``: the same products alone, at the same token counts and in the same micro-batches: the base model's passes
    (prefix; inner pass forward and backward to the lowest edited layer; base pass of the locality examples; forward and
    backward of both probes above the cut, without any branch; the output layer at targets only) and the editor
    network's seven products a row, by the same library. ``warm`` has its own floor, without what is cached. Softmax,
    optimizer and copies are not part of a floor. All are measured alternately within each step;
``stages``: CPU seconds an episode of each stage of a step, timed around the trainer's methods;
``memory``: the peak of a process that trains with this batch size, caches nothing, and does nothing else;
``reference``: one episode of ``tests/reference.py``, the paper written literally (without its optimizer).
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import common
from remend.core.cpu_matmul import matmul
from remend.core.low_rank_hooks import frozen
from remend.editors.factor_packing import PackedFactors
from remend.fingerprint import find_modules
from remend.tasks.causal_lm import Example
from remend.training import Resources, Trainer

REFERENCE = common.HERE.parent / "tests" / "reference.py"
REQUESTS_PER_EPISODE = 8
"""Enough that hardly any locality example is drawn twice."""

STAGES = (
    "prefix",
    "inner pass",
    "base logits",
    "edited forward",
    "edited backward",
    "editor forward",
    "editor backward",
    "weight gradients",
    "Adam",
    "rest",
)

T = TypeVar("T")


# -- stages --------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Measures CPU seconds of nested stages; the time of an inner stage does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._stack = ["rest"]
        self._since = time.process_time()

    @property
    def current(self) -> str:
        """The innermost stage that is running."""
        return self._stack[-1]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time within the block for this stage."""
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self.current] += now - self._since
        self._since = now

    def wrap(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """Return the function with its calls timed."""

        def timed(*args: Any, **kwargs: Any) -> T:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed

    def wrap_iterator(self, name: str, function: Callable[..., Iterable[T]]) -> Callable[..., Iterator[T]]:
        """Return a function that returns an iterator, with the computation of each element timed."""

        def timed(*args: Any, **kwargs: Any) -> Iterator[T]:
            elements = iter(function(*args, **kwargs))
            while True:
                with self.stage(name):
                    element = next(elements, None)
                if element is None:
                    return
                yield element

        return timed


def time_stages(trainer: Trainer, action: Callable[[], object]) -> dict[str, float]:
    """Run ``action`` with the trainer's methods wrapped, and return CPU seconds of each stage."""
    watch = Stopwatch()
    backward = torch.autograd.backward

    def timed_backward(*args: Any, **kwargs: Any) -> None:
        name = "edited backward" if watch.current == "edited forward" else "editor backward"
        with watch.stage(name):
            backward(*args, **kwargs)

    factored_gradients, adam = trainer.optimizer.factored_gradients, trainer.optimizer.adam
    wrapped: list[tuple[object, str, Callable[..., Any]]] = [
        (trainer.activation_cache, "prefix_states", watch.wrap("prefix", trainer.activation_cache.prefix_states)),
        (trainer.activation_cache, "packed_factors", watch.wrap("inner pass", trainer.activation_cache.packed_factors)),
        (trainer.activation_cache, "base_outputs", watch.wrap("base logits", trainer.activation_cache.base_outputs)),
        (trainer, "edited_losses", watch.wrap("edited forward", trainer.edited_losses)),
        (trainer.editor, "forward", watch.wrap("editor forward", trainer.editor.forward)),
        (factored_gradients, "gradients", watch.wrap_iterator("weight gradients", factored_gradients.gradients)),
        (adam, "step", watch.wrap("Adam", adam.step)),
    ]
    for owner, name, timed in wrapped:
        owner.__dict__[name] = timed
    torch.autograd.backward = timed_backward
    try:
        with watch.stage("rest"):
            action()
    finally:
        torch.autograd.backward = backward
        for owner, name, _ in wrapped:
            owner.__dict__.pop(name)
    return watch.seconds


# -- the floor -----------------------------------------------------------------------------------------------------


class Floor:
    """The matrix products that one step needs, at the step's token counts, and nothing else."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.task, self.prefix = trainer, trainer.task, trainer.prefix
        self.batch = trainer.episodes.batch(step, trainer.config.batch_size)
        parts = trainer._micro_batches(self.batch)
        edited = find_modules(self.task.model, trainer.editor.shapes)
        self.lowest = next(module for module in self.task.model.modules() if module in set(edited.values()))
        self.probes = [self.batch[part].probes() for part in parts]
        self.locality = [list(self.batch[part].locality) for part in parts]
        size = trainer.activation_cache.micro_batch
        self.edits = [list(self.batch.edits[start : start + size]) for start in range(0, len(self.batch), size)]
        self.states = {id(examples): self._prefix(examples) for examples in (*self.edits, *self.probes, *self.locality)}
        rows = trainer.activation_cache.packed_factors(self.batch.edits)
        self.networks = [self._operands(key, rows) for key in trainer.editor.groups]
        largest = max(parameter.numel() for parameter in trainer.editor.parameters())
        self.gradient = torch.empty(largest)

    def _operands(
        self, key: str, rows: Mapping[str, PackedFactors]
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        """Return the matrices of one network's two layers, and random rows of both widths."""
        network = self.trainer.editor.network(key)
        count = sum(sum(rows[name].counts) for name in self.trainer.editor.groups[key])
        rank, d = network.first.down.shape
        layers = [(layer.down.detach(), layer.up.detach()) for layer in (network.first, network.second)]
        return layers, torch.randn(count, d), torch.randn(count, rank)

    def _prefix(self, examples: Sequence[Example]) -> Tensor | None:
        if self.prefix.depth == 0:
            return None
        batch = self.task.collate(examples)
        with frozen(self.task.model), torch.no_grad():
            return self.prefix.compute_states(lambda: self.task.outputs(batch))

    def _forward(self, examples: Sequence[Example]) -> Tensor:
        with self.prefix.resume_from(self.states[id(examples)]):
            return self.task.outputs(self.task.collate(examples))

    def _forward_and_backward(self, examples: Sequence[Example]) -> None:
        """Run forward, and backward to the output of the lowest edited layer."""
        outputs: list[Tensor] = []

        def open_graph(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Frozen weights need no gradient, so the graph starts here.
            outputs.append(output.detach().requires_grad_())
            return outputs[-1]

        handle = self.lowest.register_forward_hook(open_graph)
        try:
            with frozen(self.task.model), torch.enable_grad():
                logits = self._forward(examples)
                torch.autograd.grad(logits, outputs, logits.detach())
        finally:
            handle.remove()

    def prefixes(self) -> None:
        """Run the blocks below the cut once for each example."""
        for examples in (*self.edits, *self.probes):
            self._prefix(examples)

    def inner(self) -> None:
        """Run the pass that gives the gradient factors."""
        for examples in self.edits:
            self._forward_and_backward(examples)

    def base(self) -> None:
        """Run the unedited model above the cut on the locality examples."""
        for examples in self.locality:
            with frozen(self.task.model), torch.no_grad():
                self._forward(examples)

    def base_head(self) -> None:
        """Run the output layer on the locality examples' targets."""
        # Logits are too large to cache, so this is part of both floors.
        weight = self.task.head.weight.detach()
        for examples in self.locality:
            torch.randn(sum(len(example.target) for example in examples), weight.shape[1]) @ weight.mT

    def edited(self) -> None:
        """Run paraphrases and locality examples above the cut, forward and backward."""
        for examples in self.probes:
            self._forward_and_backward(examples)

    def editor(self) -> None:
        """Run the editor networks: per layer 2 products forward, 2 for weights, 2 for inputs (1 in the first layer)."""
        for layers, wide, narrow in self.networks:
            for down, up in layers:
                matmul(wide, down.mT)
                matmul(narrow, up.mT)
            for index, (down, up) in enumerate(reversed(layers)):
                matmul(wide, up)
                if index == 0:
                    matmul(narrow, down)
                for a, b in ((wide, narrow), (narrow, wide)):
                    matmul(a.mT, b, out=self.gradient[: a.shape[1] * b.shape[1]].view(a.shape[1], b.shape[1]))

    def seconds(self) -> dict[str, float]:
        """Measure CPU seconds of each part."""
        parts = (self.prefixes, self.inner, self.base, self.base_head, self.edited, self.editor)
        return {part.__name__: common.seconds(part) for part in parts}


WARM_PARTS = ("base_head", "edited", "editor")
FIRST_PARTS = ("prefixes", "inner", "base", "edited", "editor")  # base has the output layer in it


# -- measuring -----------------------------------------------------------------------------------------------------


def measure(config: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Measure steps, floors and stages at one batch size."""
    steps = config["warm_up_steps"] + config["steps"][str(batch_size)]
    trainer = common.random_trainer(
        config,
        REQUESTS_PER_EPISODE * batch_size * steps + 4,
        Resources(),
        batch_size=batch_size,
    )
    rounds: list[dict[str, Any]] = []
    for step in range(steps):
        trainer.step = step
        first = time_stages(trainer, trainer.train_step)
        trainer.step = step
        warm = time_stages(trainer, trainer.train_step)
        floor = Floor(trainer, step).seconds()
        rounds.append({"first": first, "warm": warm, "floor": floor})
    rounds = rounds[config["warm_up_steps"] :]
    epochs = {
        "first": summarize(
            [entry["first"] for entry in rounds], [entry["floor"] for entry in rounds], FIRST_PARTS, batch_size
        ),
        "warm": summarize(
            [entry["warm"] for entry in rounds], [entry["floor"] for entry in rounds], WARM_PARTS, batch_size
        ),
    }
    return {"batch_size": batch_size, "micro_batch": trainer.micro_batch, "steps": len(rounds), **epochs}


def summarize(
    stages: Sequence[Mapping[str, float]], floors: Sequence[Mapping[str, float]], parts: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """Return medians over steps, in seconds an episode; the ratio to the floor is computed for each step."""
    totals = [sum(step.values()) for step in stages]
    minimums = [sum(step[part] for part in parts) for step in floors]
    without_adam = [total - step["Adam"] for total, step in zip(totals, stages, strict=True)]

    def median(values: Iterable[float]) -> float:
        return statistics.median(values) / batch_size

    return {
        "seconds_per_episode": median(totals),
        "floor_seconds_per_episode": median(minimums),
        "ratio": statistics.median(a / b for a, b in zip(totals, minimums, strict=True)),
        "ratio_without_adam": statistics.median(a / b for a, b in zip(without_adam, minimums, strict=True)),
        "stages": {name: median(step[name] for step in stages) for name in STAGES},
        "floor_parts": {name: median(step[name] for step in floors) for name in parts},
    }


def measure_memory(config: Mapping[str, Any], batch_size: int) -> dict[str, int | None]:
    """Measure the peak memory of this process over a few steps, and of libraries, model, editor and Adam."""
    libraries = common.peak_memory()
    torch.set_num_threads(1)
    resources = Resources(cache=config["memory_cache"])
    trainer = common.random_trainer(config, max(2 * batch_size, 4), resources, batch_size=batch_size)
    # Without the copy of the best state, which only a whole run keeps.
    expected = trainer.estimate_memory().total - 4 * sum(parameter.numel() for parameter in trainer.editor.parameters())
    for _ in range(2):
        trainer.train_step()
    model_parameters, editor_parameters = (
        sum(parameter.numel() for parameter in module.parameters()) for module in (trainer.task.model, trainer.editor)
    )
    return {
        "peak_bytes": common.peak_memory(),
        "estimated_bytes": expected,
        "libraries_bytes": libraries,
        "model_bytes": 4 * model_parameters,
        "editor_and_adam_bytes": 12 * editor_parameters,
    }


def load_reference() -> ModuleType:
    """Import the tests' literal version of the paper."""
    spec = importlib.util.spec_from_file_location("reference", REFERENCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["reference"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def measure_reference(config: Mapping[str, Any]) -> float:
    """Measure CPU seconds an episode of the paper written literally, forward and backward."""
    literal = load_reference()
    trainer = common.random_trainer(config, 8, Resources(cache=0.0), batch_size=1)
    editor = trainer.editor
    paper = literal.Reference(
        trainer.task.model, list(editor.shapes), dict(editor.named_parameters()), trainer.config.edit_weight
    )
    # Statistics of a training set have neutral values here: using them costs the same.
    paper.white = {name: torch.eye(d_in) for name, (d_in, _) in editor.shapes.items()}
    paper.u_norm = {name: (torch.zeros(d_in), torch.ones(d_in)) for name, (d_in, _) in editor.shapes.items()}
    paper.d_norm = {name: (torch.zeros(d_out), torch.ones(d_out)) for name, (_, d_out) in editor.shapes.items()}
    seconds = []
    for step in range(config["reference_episodes"]):
        batch = trainer.episodes.batch(step, 1)
        texts = [
            literal.Text(list(example.input), list(example.target))
            for (example,) in (batch.edits, batch.neighbours, batch.locality)
        ]
        seconds.append(common.seconds(lambda texts=texts: paper.episode_loss(*texts).backward()))
    return statistics.median(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    arguments = common.parser(__doc__, "training_speed").parse_args(argv)
    config = common.start(arguments)
    results = []
    for batch_size in config["batch_sizes"]:
        results.append(
            {**measure(config, batch_size), "memory": common.in_child_process(measure_memory, config, batch_size)}
        )
        print(json.dumps(results[-1], indent=2), flush=True)
    reference_seconds = measure_reference(config)
    largest_batch = results[-1]
    result = {
        "results": results,
        "reference": {
            "seconds_per_episode": reference_seconds,
            "times_slower_than": {
                str(row["batch_size"]): reference_seconds / row["first"]["seconds_per_episode"] for row in results
            },
        },
    }
    print(
        f"the reference takes {reference_seconds:.2f} s an episode, "
        f"this {largest_batch['first']['seconds_per_episode']:.3f} s"
    )
    common.write(arguments.out, config, result)


if __name__ == "__main__":
    main()
