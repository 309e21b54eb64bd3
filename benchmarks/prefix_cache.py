"""The time that the activation cache saves in later epochs over the same requests.

    python benchmarks/prefix_cache.py [--config FILE] [--out result.json]

A random model of twelve blocks, of which three are edited. Each variant caches other things in the first epochs,
which are not timed; then the variants take turns, one step each, over some more epochs. Times are CPU seconds of the
process on one thread for a whole step, including editor and optimizer; ``ratio`` is the median over steps of the
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


class FilteredStore(TensorStore):
    """A store that keeps only entries of some kinds."""

    def __init__(self, budget: int, kinds: Sequence[str]) -> None:
        super().__init__(budget)
        self.kinds = kinds

    def put(self, key: str, entry: Entry) -> None:
        """Store the entry if it is of one of the kinds."""
        if key.partition("-")[0] in self.kinds:
            super().put(key, entry)


@dataclass(frozen=True)
class Variant:
    """What is cached from one epoch to the next."""

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


def filled_cache(trainer: Trainer, variant: Variant, budget: int, folder: Path, steps: int) -> ActivationCache:
    """Return the cache of a variant, filled by the first ``steps`` steps.

    A disk cache is filled, closed and opened again, as a later run would do.
    """

    def open_cache() -> ActivationCache:
        states = TensorStore(0, folder) if variant.disk else FilteredStore(budget, variant.kinds)
        return ActivationCache(
            trainer.task, trainer.editor, trainer.prefix, states, FilteredStore(budget, variant.kinds)
        )

    trainer.activation_cache = open_cache()
    for step in range(steps if variant.kinds or variant.disk else 0):
        trainer._look_up(trainer.episodes.batch(step, trainer.config.batch_size))
    trainer.activation_cache.flush()
    return open_cache() if variant.disk else trainer.activation_cache


def measure(trainer: Trainer, caches: Sequence[ActivationCache], steps: range, warm_up: int) -> list[list[float]]:
    """Measure CPU seconds of each step with each cache, alternately."""
    seconds: list[list[float]] = [[] for _ in caches]
    for step in (*range(warm_up), *steps):
        for cache, of_cache in zip(caches, seconds, strict=True):
            trainer.activation_cache, trainer.step = cache, step
            of_cache.append(common.seconds(trainer.train_step))
    return [of_cache[warm_up:] for of_cache in seconds]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    arguments = common.parser(__doc__, "prefix_cache").parse_args(argv)
    config = common.start(arguments)
    trainer = common.random_trainer(config, config["requests"], Resources(cache=0.0, micro_batch=config["micro_batch"]))
    size = trainer.config.batch_size
    epoch = -(-config["requests"] // size)
    # Each epoch draws other locality examples, so several epochs are needed to cache nearly all of them.
    before = config["epochs_before"] * epoch
    with tempfile.TemporaryDirectory() as name:
        folder, budget = Path(name), int(config["cache"] * 1e9)
        caches = [filled_cache(trainer, variant, budget, folder, before) for variant in VARIANTS]
        on_disk = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        in_memory = [cache.states.used + cache.factors.used for cache in caches]
        steps = range(before, before + config["epochs"] * epoch)
        seconds = measure(trainer, caches, steps, config["warm_up_steps"])
    results = [
        {
            "kept": variant.name,
            "seconds_per_episode": statistics.median(of_variant) / size,
            "ratio": statistics.median(a / b for a, b in zip(of_variant, seconds[0], strict=True)),
            "memory_bytes": memory,
            "disk_bytes": on_disk if variant.disk else 0,
        }
        for variant, of_variant, memory in zip(VARIANTS, seconds, in_memory, strict=True)
    ]
    for row in results:
        print(f"{row['kept']}: {1000 * row['seconds_per_episode']:.1f} ms an episode, ratio {row['ratio']:.2f}")
    common.write(arguments.out, config, {"steps": len(steps), "results": results})


if __name__ == "__main__":
    main()
