"""Everything that remend knows by name: data sets, formats, metrics, editors and kinds of models. Add one here.

An entry names its target as ``"module:attribute"``, so that a list of names stays quick and needs no optional package.
See :mod:`remend.registry` for how other packages add entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from remend.registry import Registry, RegistryEntry

# --- data sets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DataSet(RegistryEntry):
    """A data set of edit requests.

    The target is a function that returns edit requests. It is called with

    - ``(path, skip)`` for a data set that is read from a file (``zsre:FILE``), where ``skip`` is called with the reason
      for each thing that is left out: see :func:`remend.data.json_rows.json_reader`;
    - ``(split)`` for one that ships with its package and has ``splits`` (``atlas:train``);
    - ``(task, path, n, seed, skip)`` for one that ``needs_model``: requests that a model makes of a file.

    Attributes:
        license: under which it was published.
        url: where it comes from.
        splits: the names of its splits, where no file is needed.
        needs_model: whether a model makes the requests.
    """

    license: str = ""
    url: str = ""
    splits: tuple[str, ...] = ()
    needs_model: bool = False


_SPLITS = ("train", "validation", "test")

DATASETS = Registry(
    "data set",
    "remend.datasets",
    DataSet,
    [
        DataSet(
            name="atlas",
            target="remend.data.atlas:requests",
            help="the built-in facts as sentences to complete",
            splits=_SPLITS,
        ),
        DataSet(
            name="questions",
            target="remend.data.atlas_questions:requests",
            help="the built-in facts as questions to answer",
            splits=_SPLITS,
        ),
        DataSet(
            name="claims",
            target="remend.data.atlas_claims:requests",
            help="the built-in facts as claims that are true or false, for a classifier",
            splits=_SPLITS,
        ),
        DataSet(
            name="counterfact",
            target="remend.data.counterfact:read",
            help="false completions, with neighbours of the same true and of the same new answer",
            license="MIT",
            url="https://rome.baulab.info/data/dsets/",
        ),
        DataSet(
            name="zsre",
            target="remend.data.zsre:read",
            help="questions with rephrasings and an unrelated question each",
            license="MIT",
            url="https://github.com/eric-mitchell/mend",
        ),
        DataSet(
            name="mquake",
            target="remend.data.mquake:read",
            help="edits, one or several a case, and questions of several hops that follow from them",
            license="see its page",
            url="https://github.com/princeton-nlp/MQuAKE",
        ),
        DataSet(
            name="ripple",
            target="remend.data.ripple:read",
            help="RippleEdits: edits with six kinds of tests of their consequences",
            license="MIT",
            url="https://github.com/edenbiran/RippleEdits",
        ),
        DataSet(
            name="knowedit",
            target="remend.data.knowedit:read",
            help="wiki_counterfact, wiki_recent and ZsRE with portability and locality by kind",
            license="MIT",
            url="https://huggingface.co/datasets/zjunlp/KnowEdit",
        ),
        DataSet(
            name="fever",
            target="remend.data.fever:read",
            help="claims whose labels are flipped, or pairs of evidence and claim with their twins; for classifiers",
            license="CC BY-SA 3.0 (FEVER), MIT (FeverSymmetric)",
            url="https://fever.ai/dataset/fever.html",
        ),
        DataSet(
            name="nq",
            target="remend.data.nq:read",
            help="NQ-open: true answers to open questions",
            license="Apache-2.0",
            url="https://github.com/google-research-datasets/natural-questions",
        ),
        DataSet(
            name="passages",
            target="remend.data.passages:generation_requests",
            help="passages of any plain text (blank lines separate them), with a model's samples as targets",
            license="that of the text",
            url="https://arxiv.org/abs/2110.11309",
            needs_model=True,
        ),
    ],
)
"""Data sets by name: what ``remend.read_source`` and ``--data`` read as ``NAME:SPLIT`` or ``NAME:FILE``."""


# --- formats ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Format(RegistryEntry):
    """A format in which edits are exported and imported.

    The target is a subclass of :class:`remend.formats.EditFormat`, which is made without arguments.

    Attributes:
        title: what a folder of the format is, with its article, to complete "... is" and for lists to choose from.
    """

    title: str = ""


FORMATS = Registry(
    "format",
    "remend.formats",
    Format,
    [
        Format(
            name="native",
            target="remend.formats.native:NativeFormat",
            help="as remend saves edits, with their requests",
            title="an edit of remend",
        ),
        Format(
            name="peft",
            target="remend.formats.peft:PeftFormat",
            help="to be loaded by PEFT and served by LoRA servers",
            title="a LoRA adapter (PEFT)",
        ),
        Format(
            name="merged",
            target="remend.formats.merged_checkpoint:MergedFormat",
            help="a checkpoint that loads wherever the base model loads",
            title="a merged model",
        ),
    ],
)
"""Formats of edits by name: ``--to`` of ``remend export``, and what ``remend import`` recognizes, in this order."""


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TaskEntry(RegistryEntry):
    """A kind of model. The target is a subclass of :class:`remend.tasks.base.Task`.

    Attributes:
        input_key: the key of requests that holds its input, where that is not a text (``"image"``).
        input_type: ``"module:attribute"`` of the input's class, a subclass of :class:`remend.request.Input`, or the
            class itself.
    """

    input_key: str = ""
    input_type: object = None


class TaskRegistry(Registry[TaskEntry]):
    """The kinds of models, in the order in which :func:`remend.wrap` asks them whether a model is theirs."""

    def load_input(self, name: str) -> Any:
        """Return the class of a task's inputs.

        Raises:
            RegistryError: as :meth:`load`.
        """
        target = self.get(name).input_type
        return self._import(name, target) if isinstance(target, str) else target


TASKS = TaskRegistry(
    "task",
    "remend.tasks",
    TaskEntry,
    [
        TaskEntry("causal-lm", "remend.tasks.causal_lm:CausalLM", "Models that continue a text."),
        TaskEntry("seq2seq", "remend.tasks.seq2seq:Seq2SeqLM", "Encoder-decoders that answer a text."),
        TaskEntry(
            "image-classification",
            "remend.tasks.image_classification:ImageClassification",
            "Models that give an image a label.",
            input_key="image",
            input_type="remend.tasks.image_classification:Image",
        ),
        TaskEntry(
            "policy",
            "remend.tasks.policy:Policy",
            "Control policies that choose an action in a state.",
            input_key="observation",
            input_type="remend.tasks.policy:Observation",
        ),
        TaskEntry(
            "classification",
            "remend.tasks.text_classification:TextClassification",
            "Models that give a text, or a pair of texts, a label.",
        ),
    ],
)
"""Every kind of model."""

# --- metrics ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Metric(RegistryEntry):
    """A metric of what one edit does.

    The target is a function from a :class:`remend.evaluation.metrics.edit_outcome.EditOutcome` to one
    :class:`~remend.evaluation.metrics.edit_outcome.PromptScore` for each prompt that it looks at. Scores are averaged
    over the prompts of an edit, then over edits; those that name a kind are also reported by kind, as ``NAME_KIND``.

    Attributes:
        title: its name in tables and plots; by default the name with spaces.
        higher_is_better: the direction in which a value is an improvement.
        modes: the modes of its values, the one that tables show first. A metric that has one value only has the mode
            ``value``.
        fields: fields of a request, at least one of which must hold something; empty if every request will do.
        discrete: whether it needs outputs over a finite set of classes, such as tokens or labels.
        generates: whether it needs a model whose answers are texts that it writes.
        headline: whether the table of all edits on the HTML page has a column for it.
    """

    title: str = ""
    higher_is_better: bool = True
    modes: tuple[str, ...] = ("value",)
    fields: tuple[str, ...] = ()
    discrete: bool = False
    generates: bool = False
    headline: bool = False


_ANSWER_MODES = ("generated", "teacher_forced", "token_accuracy", "contains", "token_f1")
_UNCHANGED_MODES = ("generated", "teacher_forced", "contains", "token_f1")

METRICS = Registry(
    "metric",
    "remend.metrics",
    Metric,
    [
        Metric(
            name="reliability",
            target="remend.evaluation.metrics.success:reliability",
            help="the edited prompt itself is answered with the target",
            modes=_ANSWER_MODES,
        ),
        Metric(
            name="generality",
            target="remend.evaluation.metrics.success:generality",
            help="paraphrases are answered with the target",
            modes=_ANSWER_MODES,
            fields=("paraphrases",),
        ),
        Metric(
            name="generality_unseen",
            target="remend.evaluation.metrics.success:generality_unseen",
            help="so are phrasings that training never saw",
            modes=_ANSWER_MODES,
            fields=("unseen_paraphrases",),
            headline=True,
        ),
        Metric(
            name="edit_success",
            target="remend.evaluation.metrics.success:edit_success",
            help="prompt and paraphrases together (MEND, Eq. 1)",
            modes=_ANSWER_MODES,
            headline=True,
        ),
        Metric(
            name="format_shift",
            target="remend.evaluation.metrics.success:format_shift",
            help="the same asked in another form: question, completion, chat",
            modes=_ANSWER_MODES,
            fields=("formats",),
        ),
        Metric(
            name="portability",
            target="remend.evaluation.metrics.success:portability",
            help="what follows from the edit is answered rightly",
            modes=_ANSWER_MODES,
            fields=("portability",),
        ),
        Metric(
            name="portability_negated",
            target="remend.evaluation.metrics.success:portability_negated",
            help="prompts that deny the fact are not answered with it",
            fields=("negated",),
        ),
        Metric(
            name="negated_before",
            target="remend.evaluation.metrics.success:negated_before",
            help="the unedited model does not answer prompts that deny the fact as it answers the prompt",
            fields=("negated",),
        ),
        Metric(
            name="outdated",
            target="remend.evaluation.metrics.success:outdated",
            help="prompts that the old fact answered are not answered with it any more",
            fields=("outdated",),
        ),
        Metric(
            name="pair_consistency",
            target="remend.evaluation.metrics.success:pair_consistency",
            help="the prompt gets its target, and with another subject it keeps its answer, both together",
            modes=("generated", "teacher_forced"),
            fields=("near",),
        ),
        Metric(
            name="locality_far",
            target="remend.evaluation.metrics.locality:locality_far",
            help="unrelated prompts keep their answer",
            modes=_UNCHANGED_MODES,
            fields=("locality",),
            headline=True,
        ),
        Metric(
            name="locality_near",
            target="remend.evaluation.metrics.locality:locality_near",
            help="related prompts that must stay keep their answer",
            modes=_UNCHANGED_MODES,
            fields=("near",),
            headline=True,
        ),
        Metric(
            name="locality_adversarial",
            target="remend.evaluation.metrics.locality:locality_adversarial",
            help="unrelated prompts keep their answer with the edit put before them",
            modes=_UNCHANGED_MODES,
            fields=("locality",),
            headline=True,
        ),
        Metric(
            name="accuracy_drawdown",
            target="remend.evaluation.metrics.locality:accuracy_drawdown",
            help="right answers to unrelated prompts that were lost",
            higher_is_better=False,
            modes=("generated", "teacher_forced"),
            fields=("locality",),
        ),
        Metric(
            name="elsewhere",
            target="remend.evaluation.metrics.elsewhere:elsewhere",
            help="choices on ordinary text that stay",
            headline=True,
        ),
        Metric(
            name="kl_elsewhere",
            target="remend.evaluation.metrics.elsewhere:kl_elsewhere",
            help="divergence from the unedited model on ordinary text, in nats",
            higher_is_better=False,
        ),
        Metric(
            name="perplexity_ratio",
            target="remend.evaluation.metrics.elsewhere:perplexity_ratio",
            help="perplexity of ordinary text, as a multiple of the unedited model's",
            higher_is_better=False,
        ),
        Metric(
            name="perplexity_drawdown",
            target="remend.evaluation.metrics.elsewhere:perplexity_drawdown",
            help="perplexity that an edit adds on a text that is given",
            higher_is_better=False,
        ),
        Metric(
            name="readability",
            target="remend.evaluation.metrics.elsewhere:readability",
            help="the edit's numbers tell which of ten names it is about",
            higher_is_better=False,
        ),
        Metric(
            name="kl_far",
            target="remend.evaluation.metrics.locality:kl_far",
            help="divergence from the unedited model at unrelated prompts, in nats",
            higher_is_better=False,
            fields=("locality",),
        ),
        Metric(
            name="kl_near",
            target="remend.evaluation.metrics.locality:kl_near",
            help="divergence at related prompts, in nats",
            higher_is_better=False,
            fields=("near",),
        ),
        Metric(
            name="kl_adversarial",
            target="remend.evaluation.metrics.locality:kl_adversarial",
            help="divergence with the edit put before the prompt, in nats",
            higher_is_better=False,
            fields=("locality",),
        ),
        Metric(
            name="target_probability",
            target="remend.evaluation.metrics.confidence:target_probability",
            help="probability of the target at the edited prompt",
        ),
        Metric(
            name="target_rank",
            target="remend.evaluation.metrics.confidence:target_rank",
            help="rank of the target's first token among all tokens",
            higher_is_better=False,
            discrete=True,
        ),
        Metric(
            name="continuation_perplexity",
            target="remend.evaluation.metrics.confidence:continuation_perplexity",
            help="perplexity of what follows the target, of a model that goes on writing, by the unedited one",
            higher_is_better=False,
            generates=True,
        ),
        Metric(
            name="fluency",
            target="remend.evaluation.metrics.fluency:fluency",
            help="entropy of a continuation's bi- and trigrams, in bits",
            fields=("generation",),
            generates=True,
        ),
        Metric(
            name="repetition",
            target="remend.evaluation.metrics.fluency:repetition",
            help="trigrams of a continuation that stood in it before",
            higher_is_better=False,
            fields=("generation",),
            generates=True,
        ),
    ],
)
"""Metrics by name, in the order of tables: what ``remend evaluate`` measures and its reports are read by."""


# --- editors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EditorEntry(RegistryEntry):
    """An editor.

    The target is a subclass of :class:`remend.editors.Editor`, whose ``info`` has the entry's name.

    Attributes:
        needs: what it needs before its first edit: ``nothing``, ``text`` (on which it measures the model's activations)
            or ``training``.
    """

    needs: str = "nothing"


EDITORS = Registry(
    "editor",
    "remend.editors",
    EditorEntry,
    [
        EditorEntry(
            name="mend",
            target="remend.editors.mend.editor:Mend",
            help="editor networks that transform the gradient (Mitchell et al. 2022)",
            needs="training",
        ),
        EditorEntry(
            name="mend-subject",
            target="remend.editors.mend.subject:SubjectMend",
            help="editor networks that transform the gradient where the subject is read, as a hidden unit",
            needs="training",
        ),
        EditorEntry(
            name="ke",
            target="remend.editors.ke:Ke",
            help="KnowledgeEditor: a rank-one gate on the gradient, and a shift (De Cao et al. 2021)",
            needs="training",
        ),
        EditorEntry(
            name="enn",
            target="remend.editors.enn:Enn",
            help="editable neural networks: the edited matrices are trained to be editable (Sinitsin et al. 2020)",
            needs="training",
        ),
        EditorEntry(
            name="fit",
            target="remend.editors.locate_then_edit.fit:Fit",
            help="a value fitted where the subject is read, as a hidden unit (or of low rank)",
        ),
        EditorEntry(
            name="ridge",
            target="remend.editors.ridge:Ridge",
            help="keys, gradients and a ridge regression (after UltraEdit, Gu et al. 2025)",
        ),
        EditorEntry(
            name="finetune",
            target="remend.editors.finetune:FineTune",
            help="fine-tuning on the edit until the model answers with the target",
        ),
        EditorEntry(
            name="finetune-local",
            target="remend.editors.finetune:FineTuneLocal",
            help="fine-tuning of one later down-projection, for epochs (Yang et al. 2025)",
        ),
        EditorEntry(
            name="rome",
            target="remend.editors.locate_then_edit.rome:Rome",
            help="rank-one change where the subject is read (Meng et al. 2022)",
            needs="text",
        ),
        EditorEntry(
            name="memit",
            target="remend.editors.locate_then_edit.memit:Memit",
            help="changes of several blocks where the subject is read (Meng et al. 2023)",
            needs="text",
        ),
        EditorEntry(
            name="lookup",
            target="remend.editors.lookup:Lookup",
            help="answers that are looked up by the final hidden state (Mitchell et al. 2022, App. G)",
        ),
        EditorEntry(
            name="in-context",
            target="remend.editors.in_context:InContext",
            help="the fact in the prompt (Zheng et al. 2023)",
        ),
    ],
)
"""Editors by name: ``remend.editors.make``, ``--editor`` and ``--method``."""

DEFAULT_EDITOR = "fit"
"""The editor for a model that none was trained for, where it can edit it (:func:`remend.editors.default_editor`)."""
