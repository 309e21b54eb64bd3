"""What a training episode costs, and how far that is from the cost of its matrix products alone.

    python benchmarks/training_speed.py [--config FILE] [--out result.json]

A random model of distilGPT-2's size, six matrices, the paper's rank of 1920. One thread, CPU seconds of the process;
medians over some steps. For each batch size:

``first``: a step of which every example is new, so that all constants are computed;
``warm``: the same step again, as in a later epoch: hidden states and gradient factors come from the stores;
``floor``: the same products alone, at the same token counts and in the same micro-batches: the base model's passes
    (prefix; inner pass forward and backward to the lowest edited layer; base pass of the locality examples; forward and
    backward of both probes above the cut, without any branch; the output layer at targets only) and the editor
    network's seven products a row, by the same library. ``warm`` has a floor of its own, without what is looked up. No
    softmax, no optimiser, no copy is part of a floor. The four take turns within each step;
``stages``: the share of each stage of a step, in CPU seconds an episode, timed around the trainer's own methods;
``memory``: the peak of a process that trains with this batch size, keeps no constants, and does nothing else;
``reference``: one episode of ``tests/reference.py``, the paper written literally (without its optimiser).
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
from remend.core.hooks import frozen
from remend.core.matmul import matmul
from remend.editors.packing import PackedFactors
from remend.fingerprint import find_modules
from remend.tasks.causal_lm import Example
from remend.training import Resources, Trainer
from remend.training.memory import estimate

REFERENCE = common.HERE.parent / "tests" / "reference.py"
LOCALITY_POOL = 8
"""Requests for each episode that is run: so many locality examples that hardly one is drawn twice."""

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
    """CPU seconds of each stage; a stage within another is taken from it."""

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
        """Within the block, time is this stage's."""
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
        """The function, with its calls timed."""

        def timed(*args: Any, **kwargs: Any) -> T:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed

    def wrap_iterator(self, name: str, function: Callable[..., Iterable[T]]) -> Callable[..., Iterator[T]]:
        """The function that returns an iterator, with the making of each element timed."""

        def timed(*args: Any, **kwargs: Any) -> Iterator[T]:
            elements = iter(function(*args, **kwargs))
            while True:
                with self.stage(name):
                    element = next(elements, None)
                if element is None:
                    return
                yield element

        return timed


def stages_of(trainer: Trainer, action: Callable[[], object]) -> dict[str, float]:
    """CPU seconds that ``action`` spends in each stage of the trainer, whose methods are wrapped meanwhile."""
    watch = Stopwatch()
    backward = torch.autograd.backward

    def timed_backward(*args: Any, **kwargs: Any) -> None:
        name = "edited backward" if watch.current == "edited forward" else "editor backward"
        with watch.stage(name):
            backward(*args, **kwargs)

    ledger, adam = trainer.optimiser.ledger, trainer.optimiser.adam
    wrapped: list[tuple[object, str, Callable[..., Any]]] = [
        (trainer.constants, "prefix_states", watch.wrap("prefix", trainer.constants.prefix_states)),
        (trainer.constants, "rows", watch.wrap("inner pass", trainer.constants.rows)),
        (trainer.constants, "base_logits", watch.wrap("base logits", trainer.constants.base_logits)),
        (trainer, "edited_losses", watch.wrap("edited forward", trainer.edited_losses)),
        (trainer.editor, "forward", watch.wrap("editor forward", trainer.editor.forward)),
        (ledger, "gradients", watch.wrap_iterator("weight gradients", ledger.gradients)),
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
    """The products that one step cannot do without, and nothing else, at the step's own token counts."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.task, self.prefix = trainer, trainer.task, trainer.prefix
        self.batch = trainer.episodes.batch(step, trainer.config.batch_size)
        self.parts = trainer._parts(self.batch)
        edited = find_modules(self.task.model, trainer.editor.shapes)
        self.lowest = next(module for module in self.task.model.modules() if module in set(edited.values()))
        self.probes = [self.batch[part].probes() for part in self.parts]
        self.locality = [list(self.batch[part].locality) for part in self.parts]
        size = trainer.constants.micro_batch
        self.edits = [list(self.batch.edits[start : start + size]) for start in range(0, len(self.batch), size)]
        self.states = {id(pairs): self._prefix(pairs) for pairs in (*self.edits, *self.probes, *self.locality)}
        rows = trainer.constants.rows(self.batch.edits)
        self.networks = [self._operands(key, rows) for key in trainer.editor.groups]
        largest = max(parameter.numel() for parameter in trainer.editor.parameters())
        self.gradient = torch.empty(largest)

    def _operands(
        self, key: str, rows: Mapping[str, PackedFactors]
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        """The two layers' matrices of one network, and rows of both widths."""
        network = self.trainer.editor.network(key)
        count = sum(sum(rows[name].counts) for name in self.trainer.editor.groups[key])
        rank, d = network.first.down.shape
        layers = [(layer.down.detach(), layer.up.detach()) for layer in (network.first, network.second)]
        return layers, torch.randn(count, d), torch.randn(count, rank)

    def _prefix(self, pairs: Sequence[Example]) -> Tensor | None:
        if self.prefix.depth == 0:
            return None
        batch = self.task.collate(pairs)
        with frozen(self.task.model), torch.no_grad():
            return self.prefix.compute_states(lambda: self.task.outputs(batch))

    def _forward(self, pairs: Sequence[Example]) -> Tensor:
        with self.prefix.resume_from(self.states[id(pairs)]):
            return self.task.outputs(self.task.collate(pairs))

    def _forward_and_backward(self, pairs: Sequence[Example]) -> None:
        """Backward to the output of the lowest edited layer; what arrives there is what a branch would be given."""
        reached: list[Tensor] = []

        def open_graph(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            reached.append(output.detach().requires_grad_())
            return reached[-1]

        handle = self.lowest.register_forward_hook(open_graph)
        try:
            with frozen(self.task.model), torch.enable_grad():
                logits = self._forward(pairs)
                torch.autograd.grad(logits, reached, logits.detach())
        finally:
            handle.remove()

    def prefixes(self) -> None:
        """The blocks below the cut, for each example once."""
        for pairs in (*self.edits, *self.probes):
            self._prefix(pairs)

    def inner(self) -> None:
        """The pass that the gradient factors are of."""
        for pairs in self.edits:
            self._forward_and_backward(pairs)

    def base(self) -> None:
        """The unedited model above the cut on the locality examples."""
        for pairs in self.locality:
            with frozen(self.task.model), torch.no_grad():
                self._forward(pairs)

    def base_head(self) -> None:
        """The output layer on the locality examples' targets: too large to be kept, so part of both floors."""
        weight = self.task.head.weight.detach()
        for pairs in self.locality:
            torch.randn(sum(len(pair.target) for pair in pairs), weight.shape[1]) @ weight.mT

    def edited(self) -> None:
        """Both probes above the cut, forward and backward."""
        for pairs in self.probes:
            self._forward_and_backward(pairs)

    def editor(self) -> None:
        """The editor networks: forward 2 products a layer, weights 2, inputs 2 in the second and 1 in the first."""
        for layers, wide, narrow in self.networks:
            for down, up in layers:
                matmul(wide, down.mT)
                matmul(narrow, up.mT)
            for place, (down, up) in enumerate(reversed(layers)):
                matmul(wide, up)
                if place == 0:
                    matmul(narrow, down)
                for a, b in ((wide, narrow), (narrow, wide)):
                    matmul(a.mT, b, out=self.gradient[: a.shape[1] * b.shape[1]].view(a.shape[1], b.shape[1]))

    def seconds(self) -> dict[str, float]:
        """CPU seconds of each part."""
        parts = (self.prefixes, self.inner, self.base, self.base_head, self.edited, self.editor)
        return {part.__name__: common.seconds(part) for part in parts}


WARM_PARTS = ("base_head", "edited", "editor")
FIRST_PARTS = ("prefixes", "inner", "base", "edited", "editor")  # base has the output layer in it


# -- measuring -----------------------------------------------------------------------------------------------------


def measure(config: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Steps, floors and stages at one batch size."""
    steps = config["warm_up_steps"] + config["steps"][str(batch_size)]
    trainer = common.random_trainer(
        config,
        LOCALITY_POOL * batch_size * steps + 4,
        Resources(),
        batch_size=batch_size,
    )
    rounds: list[dict[str, Any]] = []
    for step in range(steps):
        trainer.step = step
        first = stages_of(trainer, trainer.train_step)
        trainer.step = step
        warm = stages_of(trainer, trainer.train_step)
        floor = Floor(trainer, step).seconds()
        rounds.append({"first": first, "warm": warm, "floor": floor})
    rounds = rounds[config["warm_up_steps"] :]
    epochs = {
        "first": epoch([one["first"] for one in rounds], [one["floor"] for one in rounds], FIRST_PARTS, batch_size),
        "warm": epoch([one["warm"] for one in rounds], [one["floor"] for one in rounds], WARM_PARTS, batch_size),
    }
    return {"batch_size": batch_size, "micro_batch": trainer.micro_batch, "steps": len(rounds), **epochs}


def epoch(
    stages: Sequence[Mapping[str, float]], floors: Sequence[Mapping[str, float]], parts: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """Medians over steps, in seconds an episode; the ratio to the floor is taken step by step."""
    whole = [sum(one.values()) for one in stages]
    least = [sum(one[part] for part in parts) for one in floors]
    without_adam = [total - one["Adam"] for total, one in zip(whole, stages, strict=True)]

    def median(values: Iterable[float]) -> float:
        return statistics.median(values) / batch_size

    return {
        "seconds_per_episode": median(whole),
        "floor_seconds_per_episode": median(least),
        "ratio": statistics.median(a / b for a, b in zip(whole, least, strict=True)),
        "ratio_without_adam": statistics.median(a / b for a, b in zip(without_adam, least, strict=True)),
        "stages": {name: median(one[name] for one in stages) for name in STAGES},
        "floor_parts": {name: median(one[name] for one in floors) for name in parts},
    }


def memory(config: Mapping[str, Any], batch_size: int) -> dict[str, int | None]:
    """Peak memory of this process after a few steps, beside what libraries, model, editor and Adam take."""
    libraries = common.peak_memory()
    torch.set_num_threads(1)
    resources = Resources(cache=config["memory_cache"])
    trainer = common.random_trainer(config, max(2 * batch_size, 4), resources, batch_size=batch_size)
    # Beforehand, and without the copy of the best state that a whole run keeps.
    expected = estimate(trainer).total - 4 * sum(p.numel() for p in trainer.editor.parameters())
    for _ in range(2):
        trainer.train_step()
    numbers = [sum(p.numel() for p in module.parameters()) for module in (trainer.task.model, trainer.editor)]
    return {
        "peak_bytes": common.peak_memory(),
        "estimated_bytes": expected,
        "libraries_bytes": libraries,
        "model_bytes": 4 * numbers[0],
        "editor_and_adam_bytes": 12 * numbers[1],
    }


def load_reference() -> ModuleType:
    """The tests' literal version of the paper."""
    spec = importlib.util.spec_from_file_location("reference", REFERENCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["reference"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def reference(config: Mapping[str, Any]) -> float:
    """CPU seconds an episode of the paper written literally, forward and backward."""
    literal = load_reference()
    trainer = common.random_trainer(config, 8, Resources(cache=0.0), batch_size=1)
    editor = trainer.editor
    paper = literal.Reference(
        trainer.task.model, list(editor.shapes), dict(editor.named_parameters()), trainer.config.edit_weight
    )
    # What it takes over a training set is neutral here: it costs the same to use.
    paper.white = {name: torch.eye(d_in) for name, (d_in, _) in editor.shapes.items()}
    paper.u_norm = {name: (torch.zeros(d_in), torch.ones(d_in)) for name, (d_in, _) in editor.shapes.items()}
    paper.d_norm = {name: (torch.zeros(d_out), torch.ones(d_out)) for name, (_, d_out) in editor.shapes.items()}
    taken = []
    for step in range(config["reference_episodes"]):
        drawn = trainer.episodes.batch(step, 1)
        texts = [
            literal.Text(list(pair.input), list(pair.target))
            for (pair,) in (drawn.edits, drawn.neighbours, drawn.locality)
        ]
        taken.append(common.seconds(lambda texts=texts: paper.episode_loss(*texts).backward()))
    return statistics.median(taken)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    arguments = common.parser(__doc__, "training_speed").parse_args(argv)
    config = common.start(arguments)
    found = []
    for batch_size in config["batch_sizes"]:
        found.append({**measure(config, batch_size), "memory": common.in_a_child(memory, config, batch_size)})
        print(json.dumps(found[-1], indent=2), flush=True)
    literal = reference(config)
    largest = found[-1]
    result = {
        "results": found,
        "reference": {
            "seconds_per_episode": literal,
            "times_slower_than": {
                str(one["batch_size"]): literal / one["first"]["seconds_per_episode"] for one in found
            },
        },
    }
    print(f"the reference takes {literal:.2f} s an episode, this {largest['first']['seconds_per_episode']:.3f} s")
    common.write(arguments.out, config, result)


if __name__ == "__main__":
    main()
