"""``Fit``: the training-free editor. A value is fitted to a set of prompts, and acts where the subject's key is read.

Where: at the subject's last token, in a block before the middle of the model. There a model has heard whom a prompt is
about, and not yet what it will say: keys of other subjects are far from the edit's own, also where they have the same
answer (:mod:`remend.editors.locate_then_edit.site_survey` draws it). What: one value, by Gauss–Newton steps in the
metric of the natural gradient (:mod:`remend.editors.locate_then_edit.value_solver`), for the request's own prompt,
others that ask the same and random beginnings before them, while what the model says to other prompts about the subject
should stay.

How it acts: by default as one hidden unit more in the block's MLP, as in Transformer-Patcher (Huang et al., ICLR 2023,
arXiv 2301.09785), whose direction is whitened by ordinary text as in ROME. A linear change of a weight answers every
other input with about 1/√d of its own answer; a unit with a threshold does not answer them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from remend.config import Config, Factor
from remend.core.low_rank import LowRank, solve_at_keys
from remend.core.mlp import find_mlp
from remend.core.response import LINEAR, Response
from remend.data.edit_sets import ALIAS
from remend.editors.info import EditorInfo
from remend.editors.locate_then_edit.answer_sensitivity import AnswerSensitivity
from remend.editors.locate_then_edit.base import TASK_REQUIREMENTS, LocateThenEdit, in_prompt_batches
from remend.editors.locate_then_edit.common_questions import (
    MOST_PHRASINGS,
    Chosen,
    CommonQuestions,
    bank_hash,
    choose_questions,
    frames_that_ask,
    text_of,
)
from remend.editors.locate_then_edit.subject_finder import find_subject
from remend.editors.locate_then_edit.subject_mentions import lookalikes, mentions
from remend.editors.locate_then_edit.subject_prompts import (
    PromptContexts,
    encode_contexts,
    join_contexts,
    phrasings_of,
)
from remend.editors.locate_then_edit.value_optimization import subject_batches
from remend.editors.locate_then_edit.value_solver import SolverConfig, solve_values
from remend.editors.locate_then_edit.word_end import with_word_end
from remend.editors.saved_editor import SavedEditor
from remend.errors import FileError, RequestError
from remend.fingerprint import find_modules
from remend.models.editable_matrices import block_mlp
from remend.models.frozen_prefix import FrozenPrefix
from remend.request import KIND, Chat, EditRequest, Probe, Prompt, in_form_of
from remend.tasks.base import Example, Task
from remend.tasks.endings import asks
from remend.tasks.own_words import TARGET_AS_GIVEN, as_the_model_says_each

LOOKALIKE_WEIGHT = 0.1
"""How much names that end as the subject does count, together, against one of its own keys."""

MOST_OF_KEY = 0.75
"""The greatest threshold, as a share of what the key itself gives: w·k is not exactly 1."""

CONSTANT_FROM = 0.5
"""The least w·k with which w is a constant direction at the key."""

SILENT, SILENCE_ROUNDS, APART_NOISE = 0.01, 4, 0.1
"""What a change may answer, of its own key's answer, at tokens of given texts apart from its subject; the rounds in
which tokens with more are told apart, and the noise of their keys, against 1 of the subject's own."""

KEPT_TOKENS = 4
"""Tokens of the model's own answer to another question that should stay."""

QUESTION_WEIGHT = 0.25
"""How much answers to other questions count, against next tokens after statements, where they should stay."""


@dataclass(frozen=True)
class FitConfig(SolverConfig):
    """Settings of the editor.

    Attributes:
        kind: what the edit is made of: a hidden unit more in the MLP (``units``), or a change of its narrowing matrix
            (``low-rank``), which can be exported as a LoRA adapter.
        damping: λ of the natural gradient, as a share of the mean eigenvalue of F.
        threshold: a unit answers inputs whose q is above this, with the edit's own key at 1.
        beta: the sharpness of a unit.
    """

    damping: PositiveFloat = 0.1
    kl_weight: NonNegativeFloat = 0.07
    largest: PositiveFloat = 4.0
    beginnings: NonNegativeInt = 4
    kind: Literal["units", "low-rank"] = "units"
    threshold: Factor = 0.7
    beta: PositiveFloat = 20.0


class Fit(LocateThenEdit):
    """The training-free editor: by default one hidden unit in one MLP for each subject.

    Attributes:
        constant: the direction w with w·x ≈ 1 for every input x of the MLP, by which a unit gets its threshold.
        sensitivity: how much answers to common questions move with a value; None of models that complete no text.
        questions: how the model completes common statements; None of models that complete no text.
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "fit",
        "this package, after ROME (arXiv 2202.05262) and Transformer-Patcher (arXiv 2301.09785)",
        "nothing",
        batches=True,
        sequence="unedited",
        options=("text", "layers"),
        requires=TASK_REQUIREMENTS,
    )
    config_class: ClassVar[type[Config]] = FitConfig
    one_block: ClassVar[bool] = True
    constant: Float[Tensor, " d_in"]
    sensitivity: AnswerSensitivity | None
    questions: CommonQuestions | None

    @staticmethod
    def default_blocks(count: int) -> list[int]:
        """Return the block at a third of the depth: number 10 of 30."""
        return [max(0, min(round(count / 3), count - 2))]

    @classmethod
    def select_modules(
        cls, task: Task, config: Any, modules: Sequence[str], layers: str | None
    ) -> dict[str, nn.Module]:
        """Return the layers of one block's MLP that an edit reads and changes: the second one may be the first.

        Raises:
            ModelError: the block has no MLP that can be edited so.
        """
        if config.kind == "low-rank":
            return super().select_modules(task, config, modules, layers)
        ((block, _),) = cls.select_blocks_of_stack(task.model, layers)
        mlp = block_mlp(task.model, block)
        return find_modules(task.model, [mlp.reads, mlp.down])

    @property
    def key_layer(self) -> str:
        """The layer whose input an edit reads."""
        return next(iter(self.shapes))

    @property
    def changed_layer(self) -> str:
        """The layer to whose output an edit adds."""
        return list(self.shapes)[-1]

    @property
    def key_layers(self) -> list[str]:
        """The layers whose inputs are measured."""
        return [self.key_layer]

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Measure the inputs of the MLP on the text, or on what the model writes itself, and ask common questions."""
        self.measure_site(task, text, seed)
        self.questions = CommonQuestions.measure(task) if task.causal else None

    def measure_site(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Measure the MLP's inputs, and how answers move with its output, and draw the beginnings.

        What the model answers to common questions is not kept.
        """
        moment = self.measure(task, text, seed)[self.key_layer]
        covariance = self.covariances[self.key_layer].double()
        # Least squares: E[(w·x − 1)²] is least at w = C⁻¹ E[x].
        self.constant = torch.linalg.solve(covariance, moment.mean().to(covariance)).float()
        changed = self.edited_modules(task)[self.changed_layer]
        self.sensitivity = AnswerSensitivity.measure(task, changed, seed) if task.causal else None
        self.questions = None

    def saved_fields(self) -> dict[str, Any]:
        """Return what tells whether the common questions are those that were asked."""
        asked = bank_hash() if self.questions else ""
        return {**super().saved_fields(), "common_questions": asked, "sensitivity": self.sensitivity is not None}

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return what the editor measured."""
        tensors = {**super().saved_tensors(), "constant": self.constant}
        if self.sensitivity is not None:
            tensors["sensitivity"] = self.sensitivity.gradients
        if self.questions is not None:
            tensors |= {"answers": self.questions.tokens, "probabilities": self.questions.probabilities}
        return tensors

    def restore(self, saved: SavedEditor) -> None:
        """Take over what the editor measured."""
        tensors = dict(saved.tensors)
        self.constant = tensors.pop("constant")
        self.sensitivity = self.questions = None
        if saved.field("sensitivity", bool):
            self.sensitivity = AnswerSensitivity(tensors.pop("sensitivity"))
        if asked := saved.field("common_questions", str):
            if asked != bank_hash():
                raise FileError("the editor asked other questions than this version of remend does: make it anew")
            self.questions = CommonQuestions(tensors.pop("answers"), tensors.pop("probabilities"))
        super().restore(replace(saved, tensors=tensors))
        if self.constant.shape != (self.shapes[self.key_layer][0],):
            raise RuntimeError("the constant direction does not fit the layer")
        if self.sensitivity and self.sensitivity.gradients.shape[2:] != (self.shapes[self.changed_layer][1],):
            raise RuntimeError("the sensitivity of answers does not fit the layer")

    # -- edit ----------------------------------------------------------------------------------------------------

    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Return what each request changes by itself."""
        response = self.response(task)
        parts = [_by_subject(_with_subject(task, request)) for request in requests]
        contexts = self.encode(task, [part for of_request in parts for part in of_request])
        fitted = self._fit(task, contexts, response)
        by_request = zip(*(tensor.split([len(of_request) for of_request in parts]) for tensor in fitted), strict=True)
        return [self.change_together(keys, u, values, response, [[0]] * len(u)) for keys, u, values in by_request]

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Return what all requests change together: those about one subject share a value."""
        by_subject: dict[str, list[PromptContexts]] = {}
        owners: dict[str, list[int]] = {}
        parts = [(n, part) for n, request in enumerate(requests) for part in _by_subject(_with_subject(task, request))]
        for (number, part), contexts in zip(parts, self.encode(task, [part for _, part in parts]), strict=True):
            by_subject.setdefault(part.key, []).append(contexts)
            owners.setdefault(part.key, []).append(number)
        response = self.response(task)
        keys, u, values = self._fit(task, [join_contexts(of_subject) for of_subject in by_subject.values()], response)
        return self.change_together(keys, u, values, response, list(owners.values()))

    def encode(self, task: Task, requests: Sequence[EditRequest]) -> list[PromptContexts]:
        """Return the prompts that each request is fitted to, and those about its subject that should stay."""
        return [self._encode(task, _with_subject(task, request)) for request in requests]

    def _encode(self, task: Task, request: EditRequest) -> PromptContexts:
        chosen = Chosen()
        long = task.is_long(request.prompt)
        if self.questions is not None and not long:
            chosen = self.questions.choose(task, request)
        elif task.generates:
            chosen = choose_questions(request)
        given = list(request.given_paraphrases)
        made = [prompt for text in chosen.phrasings if (prompt := in_form_of(request.prompt, text)) not in given]
        phrasings = phrasings_of(request, (*given, *made)[: max(len(given), MOST_PHRASINGS)])
        as_given = (request.model_extra or {}).get(TARGET_AS_GIVEN)
        if isinstance(as_given, str):  # taught as the model would say it, which depends on how it is asked
            plain = [each.model_copy(update={"target": as_given}) for each in phrasings]
            phrasings = as_the_model_says_each(task, plain)
        phrasings += [_of_probe(request, probe) for probe in request.given_portability]
        given_near = [prompt for prompt in request.given_near if _names(prompt, str(request.subject))]
        asked = {request.prompt, *(each.prompt for each in phrasings)}
        # What follows from the edit does not stay, however it is asked.
        moved = frames_that_ask(
            [text_of(_of_probe(request, p)) for p in request.given_portability], str(request.subject)
        )
        made_near = [in_form_of(request.prompt, text) for text in chosen.others if text not in moved]
        kept = list(dict.fromkeys(prompt for prompt in (*given_near, *made_near) if prompt not in asked))
        contexts = encode_contexts(task, request, () if long else self.beginnings, kept, phrasings)
        if asks(request.prompt) and kept:
            # The first word of a sentence says little of what it will say.
            answers = task.predict(kept, KEPT_TOKENS)
            told = zip(contexts.kept, answers, strict=True)
            texts = tuple((replace(example, target=answer), place) for (example, place), answer in told)
            contexts = replace(contexts, kept=texts, kept_weight=QUESTION_WEIGHT)
        examples = with_word_end(task, request.prompt, [example for example, _ in contexts.examples])
        return replace(
            contexts,
            examples=tuple((e, position) for e, (_, position) in zip(examples, contexts.examples, strict=True)),
            mentions=tuple(mentions(task, request)),
            lookalikes=() if long else tuple(lookalikes(task, request)),
            near=chosen.near,
            apart=tuple(
                Example(tuple(task.encode_input(prompt)), (0,))
                for prompt in request.given_near
                if prompt not in given_near
            ),
        )

    def _fit(self, task: Task, contexts: Sequence[PromptContexts], response: Response) -> tuple[Tensor, Tensor, Tensor]:
        """Return each subject's key, the direction that answers to it with 1, and the value to add there."""
        modules = self.edited_modules(task)
        prefix = FrozenPrefix(task.model, self.shapes)
        block = self.block_of(task, self.changed_layer)
        order = sorted(range(len(contexts)), key=lambda index: contexts[index].shape)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in in_prompt_batches([contexts[index] for index in order]):
            batch, kept = subject_batches(task, part, prefix, from_subject=not response.linear)
            batches = [batch, *kept]
            inputs = [of_batch.inputs(self.key_layer, modules[self.key_layer]) for of_batch in batches]
            read = list(zip(batches, inputs, strict=True))
            by_request = [b.at_subjects(x).float().view(b.requests, b.rows_per_request, -1) for b, x in read]
            found = [self.direction(task, k, c, response) for k, c in zip(torch.cat(by_request, 1), part, strict=True)]
            key, u = (torch.stack(vectors) for vectors in zip(*found, strict=True))
            responses = [of_batch.responses(x, u, response) for of_batch, x in read]
            metrics = [self.natural_gradient(of_request.near) for of_request in part]
            values = solve_values(batch, kept, modules[self.changed_layer], block, self.config, responses, metrics)
            parts.append((key, u, values))
        keys, u, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        place = torch.tensor(order, device=keys.device).argsort()
        return keys[place], u[place], values[place]

    def natural_gradient(self, near: Collection[str] = ()) -> Callable[[Tensor], Tensor]:
        """Return what turns the gradient of a value into the direction of a step; ``near`` questions do not count."""
        if self.sensitivity is None:
            return lambda gradient: gradient
        return self.sensitivity.natural_gradient(self.config.damping, near)

    def direction(
        self, task: Task, keys: Float[Tensor, "prompt d_in"], contexts: PromptContexts, response: Response
    ) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_in"]]:
        """Return the mean of a subject's keys, and the ũ that answers it with 1, other names and ordinary text with 0.

        Least squares: ũ minimizes ũᵀCũ + Σ (ũ·k − 1)² over the keys, those of other mentions included, plus
        :data:`LOOKALIKE_WEIGHT` times the mean of (ũ·k′)² over those of the other names; and, a few times, over the
        tokens of texts apart from the subject at which the change would act all the same. Where a unit has no bias, a
        threshold θ comes from the direction w with w·x ≈ 1, if there is one: ũ' = (ũ − θw) / (1 − θ) answers with less
        than 0 where ũ does with less than θ.
        """
        if contexts.mentions:
            keys = torch.cat([keys, self.keys_at(task, self.key_layer, contexts.mentions).to(keys)])
        rows, targets, noise = keys.double(), torch.ones(len(keys)), torch.ones(len(keys))
        if contexts.lookalikes:
            unlike = self.keys_at(task, self.key_layer, contexts.lookalikes)
            rows = torch.cat([rows, unlike.to(rows)])
            targets = torch.cat([targets, torch.zeros(len(unlike))])
            noise = torch.cat([noise, torch.full((len(unlike),), len(unlike) / LOOKALIKE_WEIGHT)])
        mean = rows[: len(keys)].mean(0)
        u = self._least_squares(rows, targets, noise, mean, response)
        if contexts.apart:
            apart = self.token_keys(task, self.key_layer, contexts.apart).double()
            for _ in range(SILENCE_ROUNDS):
                answers = response(apart.to(u) @ u)
                loud = (answers.abs() > SILENT).to(apart.device)
                if not loud.any():
                    break
                rows, apart = torch.cat([rows, apart[loud].to(rows)]), apart[~loud]
                targets = torch.cat([targets, torch.zeros(int(loud.sum()))])
                noise = torch.cat([noise, torch.full((int(loud.sum()),), APART_NOISE)])
                u = self._least_squares(rows, targets, noise, mean, response)
        return mean.to(keys), u.to(keys)

    def _least_squares(
        self, rows: Float[Tensor, "key d_in"], targets: Tensor, noise: Tensor, mean: Tensor, response: Response
    ) -> Float[Tensor, " d_in"]:
        """Return the ũ that answers the mean with 1 and keys with their targets, as exactly as their noise is small."""
        whitened = self.whiten_keys(self.key_layer, rows)
        system = rows.to(whitened) @ whitened.mT + noise.double().diag()
        u: Tensor = torch.linalg.solve(system, targets.double()) @ whitened
        mean = mean.to(u)
        u = u / (mean @ u)
        w = self.constant.to(u)
        at_key = float(mean @ w)
        if self.config.kind == "units" and not response.threshold and at_key > CONSTANT_FROM:
            threshold = min(self.config.threshold, MOST_OF_KEY / at_key)
            u = (u - threshold * w) / (1 - threshold * at_key)
        return u

    def response(self, task: Task) -> Response:
        """Return how the edit's factor pairs answer."""
        if self.config.kind == "low-rank":
            return LINEAR
        mlp = find_mlp(task.model, self.key_layer, self.changed_layer)
        return mlp.response(self.config.beta, self.config.threshold if mlp.threshold else 0.0)

    def change(
        self,
        u: Float[Tensor, "*episode pair d_in"],
        values: Float[Tensor, "*episode pair d_out"],
        response: Response,
    ) -> dict[str, LowRank]:
        """Return the change of these factor pairs."""
        reads = self.key_layer if self.config.kind == "units" else ""
        return {self.changed_layer: LowRank(u, values.to(u), response, reads=reads)}

    def change_together(
        self,
        keys: Float[Tensor, "subject d_in"],
        u: Float[Tensor, "subject d_in"],
        values: Float[Tensor, "subject d_out"],
        response: Response,
        owners: Sequence[Collection[int]],
    ) -> dict[str, LowRank]:
        """Return the change that adds each subject's value at its key; ``owners`` are the requests about each subject.

        Each pair acts at the keys of the other subjects, too, as far as it answers there.
        """
        answers = response(keys.double() @ u.double().mT)
        ((name, change),) = self.change(u, solve_at_keys(answers, values), response).items()
        return {name: replace(change, keys=keys.to(u), owners=tuple(tuple(sorted(set(each))) for each in owners))}


def _by_subject(request: EditRequest) -> list[EditRequest]:
    """Return a request and those that follow from it about other subjects, each by itself."""
    own = tuple(probe for probe in request.given_portability if _is_own(probe))
    others: dict[str, EditRequest] = {}
    for probe in request.given_portability:
        if (subject := _subject_of(probe)) is None or _is_own(probe):
            continue
        if subject not in others:
            near = tuple(prompt for prompt in request.given_near if _names(prompt, subject))
            others[subject] = EditRequest(
                prompt=probe.prompt, target=probe.target, subject=subject, id=request.id, given_near=near
            )
        else:
            same = Probe(prompt=probe.prompt, target=probe.target)
            given = (*others[subject].given_portability, same)
            others[subject] = others[subject].model_copy(update={"given_portability": given})
    return [request.model_copy(update={"given_portability": own}), *others.values()]


def _subject_of(probe: Probe) -> str | None:
    """Return the subject of its own that an implication has."""
    subject = (probe.model_extra or {}).get("subject")
    if subject is None:
        return None
    if not isinstance(subject, str) or not subject.strip():
        raise RequestError(f"the subject of {str(probe.prompt)[:60]!r} in given_portability is a text, not {subject!r}")
    return subject


def _is_own(probe: Probe) -> bool:
    """Tell whether an implication is about the request's subject, by that name or another one."""
    return _subject_of(probe) is None or (probe.model_extra or {}).get(KIND) == ALIAS


def _of_probe(request: EditRequest, probe: Probe) -> EditRequest:
    """Return what follows from a request about its own subject, as a request."""
    subject = _subject_of(probe) or request.subject
    return EditRequest(prompt=probe.prompt, target=probe.target, subject=subject, id=request.id)


def _names(prompt: Prompt, subject: str) -> bool:
    """Tell whether a prompt names a subject."""
    text = prompt.messages[-1].content if isinstance(prompt, Chat) else str(prompt)
    return subject.casefold() in text.casefold()


def _with_subject(task: Task, request: EditRequest) -> EditRequest:
    """Return the request with a subject: its own, or the one found in its prompt."""
    subject = (request.subject or "").strip() or find_subject(task, request.prompt)
    return request.model_copy(update={"subject": subject})
