"""``rows_acted_on``: which texts hidden units answer at all, told without running the rest of the model.

A unit with a threshold, or with a large β, adds numbers to most inputs that are too small to change any digit. Where
all that leaves the highest edited block is the same, bit for bit, so is all that the model computes from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakSet

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from remend.core.low_rank_hooks import frozen
from remend.errors import ModelError
from remend.evaluation.interventions import Intervention
from remend.models.blocks import find_stacks
from remend.models.frozen_prefix import FrozenPrefix, run_until
from remend.tasks.base import Example, Task

_run_once: WeakSet[nn.Module] = WeakSet()
"""Blocks that are known to run once in a pass."""


@torch.no_grad()
def rows_acted_on(
    intervention: Intervention, examples: Sequence[Example], requests: int
) -> Bool[Tensor, "request example"]:
    """Return for each of an intervention's requests at which inputs it may change the model's outputs.

    False is sure. True is also returned where it cannot be told: of anything but hidden units, and of models whose
    blocks do not run one after the other, once each.

    Args:
        intervention: what acts.
        examples: the inputs, which run together.
        requests: how many requests the intervention tells apart.
    """
    task, units = intervention.task, intervention.units
    acted_on = torch.ones(requests, len(examples), dtype=torch.bool)
    above = _block_above(task, units.values(), examples[0])
    if above is None:
        return acted_on
    batch = task.collate(examples)

    def states() -> Tensor:
        return run_until(above, lambda: task.outputs(batch))

    prefix = FrozenPrefix(task.model, units)
    with frozen(task.model):
        with prefix.record_input() as recorded:
            unedited = states()
        below = recorded.get("states")
        with prefix.resume_from(below):
            if len(unedited) != batch.rows or (below is not None and not torch.equal(states(), unedited)):
                return acted_on
            for number in range(requests):
                with intervention.applied([number] * batch.rows):
                    acted_on[number] = (states() != unedited).flatten(1).any(1).cpu()
    return acted_on


def _block_above(task: Task, modules: Iterable[nn.Module], example: Example) -> nn.Module | None:
    """Return the block that reads what the highest of those with these modules computes; None where none surely does.

    It must run after them in the same stack, and all blocks once in a pass.
    """
    changed = set(modules)
    for _, named in find_stacks(task.model):
        blocks = [block for _, block in named]
        holding = [number for number, block in enumerate(blocks) if not changed.isdisjoint(block.modules())]
        inside = {module for number in holding for module in blocks[number].modules()}
        if changed and changed <= inside and holding[-1] + 1 < len(blocks) and len(set(blocks)) == len(blocks):
            above = blocks[holding[-1] + 1]
            return above if above in _run_once or _runs_once(task, above, example) else None
    return None


def _runs_once(task: Task, block: nn.Module, example: Example) -> bool:
    """Return whether a block runs once in a pass, with hidden states; a model may run all its blocks several times."""
    batch = task.collate([example])
    calls: list[int] = []
    handle = block.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        with frozen(task.model):
            run_until(block, lambda: task.outputs(batch))
            calls.clear()
            task.outputs(batch)
    except ModelError:  # a block that is called without hidden states, or not at all
        return False
    finally:
        handle.remove()
    if len(calls) == 1:
        _run_once.add(block)
    return len(calls) == 1
