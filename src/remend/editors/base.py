"""``Editor``: the life of an editor (create, edit, save, load). Come here to write one.

An editor that changes weights derives from :class:`WeightEditor`, says in :attr:`Editor.info` what it needs, and has
one method, :meth:`WeightEditor.changes`. CONTRIBUTING.md shows an example.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from remend.config import Config, from_json, to_json
from remend.core.exclusive_execution import without_autocast
from remend.core.layers import dimensions, expert_count
from remend.core.low_rank import LowRank, concatenate
from remend.core.low_rank_hooks import frozen
from remend.edit import Edit
from remend.editors.edit_types import AnyEdit
from remend.editors.info import EditorInfo
from remend.editors.request_checks import refuse_conflicts, refuse_unreadable
from remend.editors.saved_editor import EDITOR_FORMAT, SavedEditor, read_editor
from remend.errors import ConfigError, FileError, RequestError, naming
from remend.fingerprint import ModelFingerprint, find_modules
from remend.models.editable_matrices import editable_modules
from remend.request import EditRequest
from remend.saved_folders import write_folder
from remend.tasks.base import EDIT_BATCH_SIZE, Task

EditorT = TypeVar("EditorT", bound="Editor")
"""Any editor. (``typing.Self`` would say the same; beartype does not know it on methods.)"""


@runtime_checkable
class EditorLike(Protocol):
    """Whatever makes edits. It need not be an :class:`Editor` to be evaluated."""

    def edit(self, task: Task, requests: Sequence[EditRequest]) -> AnyEdit:
        """Return one edit of all requests."""
        ...

    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> Sequence[AnyEdit]:
        """Return one edit for each request."""
        ...


class Editor(ABC):
    """Turns requests into edits of a model, and never touches the model itself.

    Attributes:
        info: its name, what it needs and what its edits are.
        config_class: the class of its configuration; None if there is nothing to configure.
        measured_settings: the settings that what :meth:`prepare` measures depends on; None if it may be all.
        config: the configuration.
        base: the model that it is for.
        shapes: (d_in, d_out) of each matrix that it edits, by name.
    """

    info: ClassVar[EditorInfo]
    config_class: ClassVar[type[Config] | None] = None
    measured_settings: ClassVar[tuple[str, ...] | None] = None
    config: Any
    base: ModelFingerprint
    shapes: dict[str, tuple[int, int]]

    def __init__(self, config: Any, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.config, self.base, self.shapes = config, base, dict(shapes)

    # -- create --------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls: type[EditorT],
        task: Task,
        config: Any = None,
        *,
        text: Sequence[str] = (),
        seed: int = 0,
        modules: Sequence[str] = (),
        layers: str | None = None,
    ) -> EditorT:
        """Return an editor for a model, on the model's device.

        Args:
            task: the model.
            config: the configuration; by default :meth:`default_config`.
            text: passages like those that the model reads, for editors that measure its activations. Those that can do
                without measure them on what the model writes itself.
            seed: of every random draw; the global random state is left alone.
            modules: globs, or regular expressions after ``re:``, that name the matrices to edit; by default the MLPs'
                of the last three blocks.
            layers: the blocks to edit, as ``last-3``, ``12-14`` or ``0.6-0.8`` of the depth.

        Raises:
            ConfigError: the editor cannot edit this kind of model, has no use for an option, or needs a text and got
                none; or the configuration is not its own.
            ModelError: there is nothing to edit, or nothing matches.
        """
        config = cls.check_config(config, seed)
        selected = cls.check_model(task, config, text=text, modules=modules, layers=layers)
        shapes = {name: dimensions(module) for name, module in selected.items()}
        # Layers draw their initial weights from the global generator, whose state belongs to the caller.
        with torch.random.fork_rng(devices=[]), without_autocast():
            torch.manual_seed(seed)
            editor = cls(config, ModelFingerprint.of(task.model, selected), shapes)
            editor.prepare(task, text, seed)
        return editor

    @classmethod
    def check_model(
        cls,
        task: Task,
        config: Any,
        *,
        text: Sequence[str] = (),
        modules: Sequence[str] = (),
        layers: str | None = None,
    ) -> dict[str, nn.Module]:
        """Return the matrices that an editor with these arguments of :meth:`create` edits, by name.

        Raises:
            ConfigError: the editor cannot edit this kind of model, has no use for an option, or needs a text and got
                none.
            ModelError: there is nothing to edit, or nothing matches.
        """
        cls._check_options(task, text, modules, layers)
        selected = cls.select_modules(task, config, modules, layers)
        of_experts = [name for name, module in selected.items() if expert_count(module)]
        if of_experts and not cls.info.experts and cls.info.result != "outside":
            raise ConfigError(
                f"{of_experts[0]} holds the matrices of several experts, which {cls.info.name} cannot edit: name other "
                "matrices or blocks (attention's, say), or use mend"
            )
        return selected

    @classmethod
    def default_config(cls, seed: int = 0) -> Any:
        """Return the configuration that :meth:`create` takes where none is given."""
        return None if cls.config_class is None else cls.config_class()

    @classmethod
    def select_modules(
        cls, task: Task, config: Any, modules: Sequence[str], layers: str | None
    ) -> dict[str, nn.Module]:
        """Return the matrices to edit, by name; by default those of the MLPs of the last three blocks.

        Raises:
            ConfigError: the choice does not go with the configuration or the model.
            ModelError: there is nothing to edit, or nothing matches.
        """
        return editable_modules(task.model, modules, layers=layers)

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Measure what the editor needs of the model before its first edit; by default nothing."""
        return

    @classmethod
    def _check_options(cls, task: Task, text: Sequence[str], modules: Sequence[str], layers: str | None) -> None:
        """Refuse a task that the editor cannot edit, options that it has no use for, and a missing text."""
        name, options = cls.info.name, {"text": text, "modules": modules, "layers": layers}
        for attribute, reason in cls.info.requires.items():
            if not attrgetter(attribute)(task):
                raise ConfigError(f"{name} cannot edit models of the kind {task.kind!r}: {reason}. Use another editor")
        if unused := [option for option, value in options.items() if value and option not in cls.info.options]:
            raise ConfigError(f"{name} takes no {' and no '.join(unused)}: leave it away")
        # A string is a sequence of strings too: each letter would count as a passage.
        if isinstance(text, str):
            raise ConfigError(
                "text is a list of passages, and was given one string: [text], or remend.data.read_text(FILE)"
            )
        if cls.info.needs == "text" and not any(passage.strip() for passage in text):
            raise ConfigError(
                f"{name} measures the model's activations on ordinary text, and was given none: give text=[…], "
                "passages like those that the model reads, or --statistics FILE"
            )

    @classmethod
    def check_config(cls, config: Any, seed: int) -> Any:
        """Return the configuration, or the default one where there is none.

        Raises:
            ConfigError: it is of another class than the editor's.
        """
        if config is None:
            return cls.default_config(seed)
        if cls.config_class is None:
            raise ConfigError(f"{cls.info.name} takes no config: there is nothing to configure")
        if not isinstance(config, cls.config_class):
            raise ConfigError(
                f"{cls.info.name} is configured by a {cls.config_class.__name__}, not by a {type(config).__name__}"
            )
        return config

    # -- edit ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def edit(self, task: Task, requests: Sequence[EditRequest]) -> AnyEdit:
        """Return one edit that makes the model answer all ``requests`` as they want; the model is not changed.

        Raises:
            RequestError: there is no request, or one does not fit the model's context.
            WrongBaseError: the editor is for another kind of model.
            NonFiniteError: the model's weights or activations hold NaN or infinity.
        """

    @abstractmethod
    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> Sequence[AnyEdit]:
        """Return one edit for each request, each made from the unedited model. Raises as :meth:`edit`."""

    def check(self, task: Task, requests: Sequence[EditRequest]) -> ModelFingerprint:
        """Check a call of :meth:`edit` and return the fingerprint of the model for the edit.

        An editor that learned from a model's weights or measured its activations warns where the weights have changed.

        Raises:
            RequestError: there is no request, or one does not fit the model's context, or has unknown text.
            WrongBaseError: the model is of another kind.
        """
        if not requests or isinstance(requests, EditRequest) or not all(isinstance(r, EditRequest) for r in requests):
            raise RequestError("give a list of at least one EditRequest(prompt=…, target=…)")
        self.base.check_architecture(task.model, "this editor")
        task.choose_answer_forms(request.prompt for request in requests)
        for request in requests:  # the last of many requests should not be refused after minutes of work on the others
            task.encode(request.prompt, request.target)
        refuse_unreadable(task, requests)
        fingerprint = self.base.recomputed_for(task.model)
        measured = self.info.needs != "nothing" or "text" in self.info.options
        # An editor that neither learned nor measured anything does as well with other weights.
        if measured and fingerprint.weights != self.base.weights:
            warnings.warn(
                f"this editor was trained for {self.base.name!r}, or measured it, with other weights than this model "
                "has; its edits may be worse: evaluate them",
                stacklevel=4,
            )
        return fingerprint

    def edited_modules(self, task: Task) -> dict[str, nn.Module]:
        """Return the matrices of the model that it edits, by name."""
        return find_modules(task.model, self.shapes)

    def describe(self) -> dict[str, Any]:
        """Return what the manifests of edits say of the editor: its name and its whole configuration."""
        config = {} if self.config is None else {"config": to_json(self.config)}
        return {"name": self.info.name, **self.manifest_fields(), **config}

    def manifest_fields(self) -> dict[str, Any]:
        """Return what :meth:`describe` says beside name and configuration."""
        # Readers of manifests look for the fields here, where they were before there was "config".
        return {} if self.config is None else asdict(self.config)

    # -- save and load -------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the editor to a folder (safetensors and a JSON manifest), and return the folder."""
        return self._write(path, self.saved_tensors())

    def _write(self, path: str | Path, tensors: Mapping[str, Tensor]) -> Path:
        manifest = {
            "editor": self.info.name,
            "config": {} if self.config is None else to_json(self.config),
            "base": asdict(self.base),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }
        return write_folder(path, EDITOR_FORMAT, {**manifest, **self.saved_fields()}, tensors)

    @classmethod
    def load(cls: type[EditorT], path: str | Path) -> EditorT:
        """Read an editor that :meth:`save` wrote, from a folder or the hub (``hf:owner/name``).

        Raises:
            FileError: the folder is missing, damaged, altered, of an unknown version, or of another editor.
            ConfigError: its configuration has an unknown setting, or a value that is not allowed.
        """
        saved = read_editor(path, cls.info.name)
        with naming(path):
            config = None if cls.config_class is None else from_json(cls.config_class, saved.config)
            editor = cls.unrestored(config, saved)
            try:
                editor.restore(saved)
            except (RuntimeError, KeyError) as error:
                raise FileError(f"the tensors do not fit the configuration ({error}); it was altered") from None
            return editor

    @classmethod
    def unrestored(cls: type[EditorT], config: Any, saved: SavedEditor) -> EditorT:
        """Return the editor that :meth:`restore` completes."""
        return cls(config, saved.base, saved.shapes)

    def saved_fields(self) -> dict[str, Any]:
        """Return what the manifest of a saved editor holds beside its configuration, base and shapes."""
        return {}

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return what a saved editor holds beside its manifest: what it learned or measured; by default nothing."""
        return {}

    def restore(self, saved: SavedEditor) -> None:
        """Take over what :meth:`saved_fields` and :meth:`saved_tensors` returned.

        Raises:
            FileError: a field is missing or of the wrong type.
            KeyError: a tensor is missing.
            RuntimeError: a tensor does not fit.
        """
        if saved.tensors:
            raise RuntimeError(f"{self.info.name} has no tensor {next(iter(saved.tensors))!r}")


class WeightEditor(Editor):
    """An editor whose edits are low-rank changes of weights. A subclass has one method: :meth:`changes`.

    Attributes:
        batch_size: the most requests that :meth:`changes` is given in one call; None where it splits them itself.
    """

    batch_size: ClassVar[int | None] = EDIT_BATCH_SIZE

    @abstractmethod
    def changes(self, task: Task, requests: Sequence[EditRequest]) -> Sequence[Mapping[str, LowRank]]:
        """Return what each request changes by itself: for each matrix of :attr:`shapes` its change, by name.

        Gradients are off, so that a model's passes take little memory; turn them on with ``torch.enable_grad`` where
        they are needed.

        Args:
            task: the model, which the call leaves as it was.
            requests: at least one; their prompts and targets fit the model's context.
        """

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Return what all requests change together; by default the sum of what each changes (paper, section 3.1)."""
        parts = self._changes_of_each(task, requests)
        return {name: concatenate([part[name] for part in parts]) for name in parts[0]}

    # A server may have inference mode on, in which no gradient could be taken, or autocast.
    @torch.inference_mode(False)
    @torch.no_grad()
    @without_autocast()
    def edit(self, task: Task, requests: Sequence[EditRequest]) -> Edit:
        """Return one edit of all ``requests``; it acts once it is applied or merged. The model is not changed.

        Raises:
            RequestError: there is no request, one does not fit the model's context or has unknown text, or two want
                different answers to one prompt.
            WrongBaseError: the editor is for another kind of model.
            NonFiniteError: the model's weights or activations hold NaN or infinity.
        """
        base = self.check(task, requests)
        refuse_conflicts(task, requests)
        edit = self._edit(task, self.combine(task, requests), base, requests)
        _warn_of_zero(task, [edit])
        return edit

    @torch.inference_mode(False)
    @torch.no_grad()
    @without_autocast()
    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> list[Edit]:
        """Return one edit for each request, each made from the unedited model. Raises as :meth:`edit`."""
        base = self.check(task, requests)
        parts = self._changes_of_each(task, requests)
        edits = [self._edit(task, part, base, [request]) for part, request in zip(parts, requests, strict=True)]
        _warn_of_zero(task, edits)
        return edits

    def _edit(
        self, task: Task, changes: Mapping[str, LowRank], base: ModelFingerprint, requests: Sequence[EditRequest]
    ) -> Edit:
        separators = tuple(task.separator(request.prompt) for request in requests)
        ends = tuple(task.ends_answer(request.prompt) if task.end_tokens else None for request in requests)
        return Edit(changes, base, tuple(requests), self.describe(), separators=separators, ends=ends)

    def _changes_of_each(self, task: Task, requests: Sequence[EditRequest]) -> list[Mapping[str, LowRank]]:
        """Return :meth:`changes` of all requests, in batches."""
        size = self.batch_size or len(requests)
        parts: list[Mapping[str, LowRank]] = []
        for start in range(0, len(requests), size):
            parts += self.changes(task, requests[start : start + size])
        return parts


def _warn_of_zero(task: Task, edits: Sequence[Edit]) -> None:
    """Warn once of edits that change nothing, with why."""
    zero = [edit.requests[0] for edit in edits if edit.is_zero]
    if not zero:
        return
    batch = task.collate([task.encode(zero[0].prompt, zero[0].target)])
    with frozen(task.model):
        answered = bool(task.correct(task.outputs(batch), batch).all())
    why = "the model answers so already" if answered else "the editor did not learn it"
    which = "the edit changes" if len(edits) == 1 else f"{len(zero)} of {len(edits)} edits change"
    warnings.warn(f"{which} nothing: {why} ({str(zero[0].prompt)[:60]!r} → {zero[0].target[:40]!r})", stacklevel=6)
