"""Calibrate MEND before the first training step: which statistics are measured, in what order, on which prompts.

A resumed run looks up the same prompts in the same order, so that it continues with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from remend.core.distributed import ProcessGroup
from remend.core.sketched_moment import sketch_width
from remend.editors.factor_packing import PackedFactors, pack_active
from remend.editors.mend.calibration_measurements import (
    fit_discriminants,
    fit_limits,
    fit_whiteners_to_text,
    measure_units,
    merge_statistics,
    new_moments,
    ordinary_inputs,
    set_whiteners,
    update_moments,
    update_statistics,
)
from remend.editors.mend.transform import GradientTransform
from remend.editors.trainable import ActivationSource, CalibrationData, FactPrompts
from remend.tasks.base import Example

UNIT_BATCHES = 4
"""The number of batches over which the units of relative step sizes are measured."""

LIMIT_BATCHES = 64
"""The largest number of batches over which usual gradient norms are measured."""

DISCRIMINANT_PROMPTS = 32_768
"""The largest number of prompts over which discriminants are fitted."""

DISCRIMINANT_BATCH = 96
"""The number of prompts that go through the base model together for discriminants."""

Batches = Sequence[Sequence[Example]]


@dataclass(frozen=True)
class CalibrationPass:
    """One pass over the training set.

    Attributes:
        fit: measures something over the batches and sets it in the editor.
        batches: the examples that go through the base model together, in order.
        stores_factors: whether the packed factors of the batches are stored in the activation cache; the states that
            enter the lowest edited block always are.
    """

    fit: Callable[[Batches], None]
    batches: Batches
    stores_factors: bool = False


class MendCalibration:
    """Fits an editor to its frozen base model, in an order in which each pass needs what the ones before have set.

    Whiteners come first, since all else is measured in whitened coordinates; then limits of gradients and
    discriminants; then the statistics that normalize the networks' inputs; then the units of the step sizes. Which of
    them there are depends on the configuration. Several processes share the batches and merge what they measure.

    A resumed run has a fitted editor, but must have the same bits in its activation cache as the run before. So
    :meth:`run` and :meth:`replay` both follow :meth:`passes`.

    Args:
        editor: the editor.
        source: the base model's activations.
        data: what the editor is fitted to.
        process_group: the processes of the run.
    """

    def __init__(
        self, editor: GradientTransform, source: ActivationSource, data: CalibrationData, process_group: ProcessGroup
    ) -> None:
        self.editor, self.source, self.data, self.process_group = editor, source, data, process_group
        # Packed factors, before whitening, that later passes need again, by the number of the batch.
        self._packed: dict[int, dict[str, PackedFactors]] = {}

    def run(self) -> None:
        """Fit the editor."""
        for calibration_pass in self.passes():
            calibration_pass.fit(calibration_pass.batches)

    def replay(self) -> None:
        """Fill the activation cache as :meth:`run` did, with an editor that is fitted already."""
        for calibration_pass in self.passes():
            for examples in calibration_pass.batches:
                if calibration_pass.stores_factors:
                    packed = self.editor.pack(self.source.gradient_factors(examples))
                    self.source.put_packed_factors(examples, packed)
                else:
                    self.source.prefix_states(examples)

    def passes(self) -> list[CalibrationPass]:
        """Return this process's passes, in order."""
        config, rank, count = self.editor.config, self.process_group.rank, self.process_group.count
        edits = self.data.edits[rank::count]
        passes = []
        if config.ridge and (self.data.text or self._counts_ordinary):
            passes.append(CalibrationPass(self._fit_whiteners_to_text, []))  # a text is not cached
        elif config.ridge:
            passes.append(CalibrationPass(self._fit_whiteners, edits))
        if config.limit:
            passes.append(CalibrationPass(self._fit_limits, edits[: -(-LIMIT_BATCHES // count)]))
        if config.contrast:
            prompts = [_prompts(facts) for facts in self._fact_batches()]
            passes.append(CalibrationPass(self._fit_discriminants, prompts))
        passes.append(CalibrationPass(self._fit_statistics, edits, stores_factors=True))
        if config.relative:
            # Every process measures all of these batches, so nothing has to be merged.
            passes.append(CalibrationPass(self._measure_units, self.data.edits[:UNIT_BATCHES]))
        return passes

    @property
    def _counts_ordinary(self) -> bool:
        """Whether there are ordinary inputs, other than random ones, and they count."""
        return self.editor.config.ordinary > 0 and (self.source.task.causal or bool(self.data.text))

    @cached_property
    def ordinary(self) -> list[Example]:
        """The ordinary inputs, to which whiteners and discriminants are fitted."""
        return ordinary_inputs(self.source.task, self.data.text)

    def _fit_whiteners(self, batches: Batches) -> None:
        """Set whiteners from the inputs at every token; keep as many packed factors as there is room for."""
        moments = new_moments(self.editor)
        room = self.source.factor_budget
        for number, examples in enumerate(batches):
            factors = self.source.gradient_factors(examples)
            update_moments(moments, factors)
            packed = pack_active(factors, self.editor.device)
            room -= sum(4 * values.numel() for matrix in packed.values() for values in (matrix.u, matrix.delta))
            if room >= 0:
                self._packed[number] = packed
        set_whiteners(self.editor, moments, self.process_group)

    def _fit_whiteners_to_text(self, batches: Batches) -> None:
        fit_whiteners_to_text(self.editor, self.source.task, self.ordinary, self.process_group)

    def _fit_limits(self, batches: Batches) -> None:
        packed = (self._pack_unwhitened(number, examples) for number, examples in enumerate(batches))
        fit_limits(self.editor, packed, self.process_group)

    def _fit_discriminants(self, batches: Batches) -> None:
        pairs = list(zip(self._fact_batches(), batches, strict=True))
        ordinary = self.ordinary if self._counts_ordinary else ()
        fit_discriminants(self.editor, self.source, pairs, ordinary, self.process_group)

    def _fit_statistics(self, batches: Batches) -> None:
        for number, examples in enumerate(batches):
            packed = self.editor.whiten_and_clip(self._pack_unwhitened(number, examples))
            self._packed.pop(number, None)
            self.source.put_packed_factors(examples, packed)
            update_statistics(self.editor, packed)
        for key in self.editor.groups:
            for statistics in (self.editor.network(key).u_statistics, self.editor.network(key).delta_statistics):
                merge_statistics(statistics, self.process_group)

    def _measure_units(self, batches: Batches) -> None:
        measure_units(self.editor, self.source, batches)

    def _pack_unwhitened(self, number: int, examples: Sequence[Example]) -> Mapping[str, PackedFactors]:
        packed = self._packed.get(number)
        return packed or pack_active(self.source.gradient_factors(examples), self.editor.device)

    def _fact_batches(self) -> list[list[FactPrompts]]:
        return split_facts(self.data.facts)[self.process_group.rank :: self.process_group.count]


def split_facts(facts: Sequence[FactPrompts]) -> list[list[FactPrompts]]:
    """Split facts into batches for the base model, up to :data:`DISCRIMINANT_PROMPTS` prompts in all."""
    batches: list[list[FactPrompts]] = [[]]
    batch_size = total = 0
    for fact in facts:
        size = len(fact.prompts) + len(fact.near)
        if total + size > DISCRIMINANT_PROMPTS:
            break
        if batches[-1] and batch_size + size > DISCRIMINANT_BATCH:
            batches.append([])
            batch_size = 0
        batches[-1].append(fact)
        batch_size, total = batch_size + size, total + size
    return [batch for batch in batches if batch]


def _prompts(facts: Sequence[FactPrompts]) -> list[Example]:
    """Return all prompts of some facts, then all their neighbours."""
    return [example for fact in facts for example in fact.prompts] + [x for fact in facts for x in fact.near]


def moments_bytes(editor: GradientTransform) -> int:
    """Return the most bytes that the moments of the layers' inputs take before the first step."""
    if not editor.config.ridge and not editor.config.contrast:
        return 0
    inputs, keys, test_matrices, largest = 0, 0, {}, 0
    for name, (d, _) in editor.shapes.items():
        k = editor.directions.get(name)
        columns = sketch_width(d, k) if k else d
        inputs += d * columns if editor.config.ridge else 0
        keys += 7 * (k + 1 if k else d) ** 2 if editor.config.contrast else 0
        test_matrices[d] = d * columns if k else 0  # matrices of one width share the random vectors
        largest = max(largest, d * columns)
    # Moments of inputs and of keys exist one after the other. A decomposition needs workspace beside them.
    doubled = 2 if editor.device.type == "cpu" else 1  # the former are summed in double precision there
    return 4 * max(doubled * inputs + sum(test_matrices.values()), keys) + 4 * 8 * largest
