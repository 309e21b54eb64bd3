"""What keeping constants of the examples saves: later epochs over the same requests, with and without stores.

    python benchmarks/prefix_cache.py [--config FILE] [--out result.json]

A random model of twelve blocks, of which three are edited. Each variant keeps something else from the first epochs
(which are not timed); then the variants take turns, a step each, over some more epochs. CPU seconds of the process on
one thread for a whole step, the editor's and the optimiser's part included; ``ratio`` is the median, over steps, of the
ratio to ``nothing kept`` at the same step.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common
from remend.training import Resources, Trainer
from remend.training.activation_cache import ActivationCache
from remend.training.tensor_store import Entry, TensorStore


class Only(TensorStore):
    """A store that keeps entries of some kinds and lets others go."""

    def __init__(self, budget: int, kinds: Sequence[str]) -> None:
        super().__init__(budget)
        self.kinds = kinds

    def put(self, key: str, entry: Entry) -> None:
        """Keep the entry, if it is of one of the kinds."""
        if key.partition("-")[0] in self.kinds:
            super().put(key, entry)


@dataclass(frozen=True)
class Variant:
    """What one of the runs keeps from one epoch to the next."""

    name: str
    kinds: tuple[str, ...] = ()
    disk: bool = False


VARIANTS = (
    Variant("nothing kept"),
    Variant("prefix states", ("prefix",)),
    Variant("+ base states", ("prefix", "base")),
    Variant("+ gradient factors", ("prefix", "base", "rows")),
    Variant("prefix and base states on disk only", disk=True),
)


def kept(trainer: Trainer, variant: Variant, budget: int, folder: Path, steps: int) -> ActivationCache:
    """The constants of a variant, with what the first ``steps`` steps put into its stores.

    A disk cache is filled, closed, and opened again as a later run would do.
    """

    def opened() -> ActivationCache:
        states = TensorStore(0, folder) if variant.disk else Only(budget, variant.kinds)
        return ActivationCache(trainer.task, trainer.editor, trainer.prefix, states, Only(budget, variant.kinds))

    trainer.constants = opened()
    for step in range(steps if variant.kinds or variant.disk else 0):
        trainer._look_up(trainer.episodes.batch(step, trainer.config.batch_size))
    trainer.constants.flush()
    return opened() if variant.disk else trainer.constants


def measure(trainer: Trainer, variants: Sequence[ActivationCache], steps: range, warm_up: int) -> list[list[float]]:
    """CPU seconds of each step with each variant's constants, taken in turns."""
    taken: list[list[float]] = [[] for _ in variants]
    for step in (*range(warm_up), *steps):
        for constants, own in zip(variants, taken, strict=True):
            trainer.constants, trainer.step = constants, step
            own.append(common.seconds(trainer.train_step))
    return [own[warm_up:] for own in taken]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    arguments = common.parser(__doc__, "prefix_cache").parse_args(argv)
    config = common.start(arguments)
    trainer = common.random_trainer(config, config["requests"], Resources(cache=0.0, micro_batch=config["micro_batch"]))
    size = trainer.config.batch_size
    epoch = -(-config["requests"] // size)
    # Locality examples are drawn anew in each epoch: one epoch does not meet all of them.
    before = config["epochs_before"] * epoch
    with tempfile.TemporaryDirectory() as name:
        folder, budget = Path(name), int(config["cache"] * 1e9)
        variants = [kept(trainer, variant, budget, folder, before) for variant in VARIANTS]
        on_disk = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        in_memory = [constants.states.used + constants.factors.used for constants in variants]
        steps = range(before, before + config["epochs"] * epoch)
        taken = measure(trainer, variants, steps, config["warm_up_steps"])
    found = [
        {
            "kept": variant.name,
            "seconds_per_episode": statistics.median(own) / size,
            "ratio": statistics.median(a / b for a, b in zip(own, taken[0], strict=True)),
            "memory_bytes": memory,
            "disk_bytes": on_disk if variant.disk else 0,
        }
        for variant, own, memory in zip(VARIANTS, taken, in_memory, strict=True)
    ]
    for one in found:
        print(f"{one['kept']}: {1000 * one['seconds_per_episode']:.1f} ms an episode, ratio {one['ratio']:.2f}")
    common.write(arguments.out, config, {"steps": len(steps), "results": found})


if __name__ == "__main__":
    main()
