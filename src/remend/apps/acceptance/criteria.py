"""The criteria that an edit must meet before it is applied, and the JSON file that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from remend.errors import ConfigError, FileError, nearest
from remend.request import Probe, Prompt
from remend.saved_folders import parse_json

Share = Annotated[float, Field(ge=0, le=1)]
MAX_PERPLEXITY_TOKENS = 4_096
"""The most tokens of a text on which perplexity is measured."""


class Perplexity(BaseModel):
    """An ordinary text that the edited model must still predict.

    Attributes:
        text: the passages of the text.
        file: instead of ``text``, a file in the acceptance file's folder whose passages are separated by blank lines.
        most: the largest allowed perplexity, as a multiple of the perplexity before the edit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: tuple[str, ...] = ()
    file: str | None = None
    most: Annotated[float, Field(ge=1)] = 1.05

    @model_validator(mode="after")
    def _one_text(self) -> Perplexity:
        if bool(self.text) == (self.file is not None):
            raise ValueError("give text, a list of passages, or file, the name of a file that holds them")
        return self


class AcceptanceCriteria(BaseModel):
    """What an edit must do, and must not do, to be accepted.

    The requests that the edit itself holds name its prompts, paraphrases, near and far prompts. Shares are shares of
    prompts, from 0 to 1.

    Attributes:
        must_change: further prompts with the answers that they must get.
        must_stay: prompts whose answers must stay as before, or must be the named ones.
        takes: the smallest share of the requests' prompts, and of ``must_change``, that must get the target.
        follows: the smallest share of the requests' paraphrases that must get the target.
        stays: the smallest share of ``must_stay`` that must keep its answer.
        near, far: the smallest share of the requests' near and far prompts that must keep their answers.
        elsewhere: the smallest share of the model's first choices on ordinary text that must stay: on the text of
            ``perplexity``, or on what the model writes by itself.
        perplexity: a text that must still be predicted; causal language models only.
        size: the largest ‖ΔW‖ / ‖W‖ (Frobenius norms) that any matrix may have. Hidden units count only where it is
            set explicitly: ΔW is then the columns that they add to the narrowing projection.

    A criterion that is set explicitly counts as not met if there is nothing to measure it on; a criterion that has its
    default is then only reported as missing.

    The last three criteria tell an edited model from a ruined one. A large model's choices on ordinary text hardly
    change at all, and its edits are far smaller than its matrices, so stricter values than the defaults suit it
    (``elsewhere=0.98`` is strict for a small model).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    must_change: tuple[Probe, ...] = ()
    must_stay: tuple[Prompt | Probe, ...] = ()
    takes: Share = 1.0
    follows: Share = 0.75
    stays: Share = 1.0
    near: Share = 0.75
    far: Share = 0.95
    elsewhere: Share = 0.9
    perplexity: Perplexity | None = None
    size: Annotated[float, Field(gt=0)] = 1.0

    @staticmethod
    def read(path: str | Path) -> AcceptanceCriteria:
        """Read an acceptance file and the text that it names.

        Raises:
            FileError: the file is missing or is not JSON, or its text is outside of its folder or cannot be read.
            ConfigError: a key is unknown (the error names the nearest known key), or a value is not allowed.
        """
        path = Path(path)
        try:
            content = parse_json(path.read_bytes())
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}; give a JSON file of acceptance criteria") from None
        except (ValueError, RecursionError) as error:
            raise FileError(f"{path} is not JSON ({error})") from None
        try:
            criteria = AcceptanceCriteria.model_validate_json(json.dumps(content))
        except ValidationError as error:
            raise ConfigError(f"{path}: {_validation_message(error, content)}") from None
        if criteria.perplexity is None or criteria.perplexity.file is None:
            return criteria
        passages = _read_passages(path, criteria.perplexity.file)
        return criteria.model_copy(update={"perplexity": Perplexity(text=passages, most=criteria.perplexity.most)})


STANDARD_CRITERIA = AcceptanceCriteria()
"""The criteria that apply by default."""


def _validation_message(error: ValidationError, content: Any) -> str:
    """Return the first validation error in words."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        known = Perplexity.model_fields if "perplexity" in first["loc"][:-1] else AcceptanceCriteria.model_fields
        return f"there is no {key!r}; {nearest(unknown, known)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else f"{message}; it is a {type(content).__name__}"


def _read_passages(path: Path, name: str) -> tuple[str, ...]:
    """Read the passages of a text file in the acceptance file's folder."""
    from remend.data import read_text

    folder = path.resolve().parent
    # Resolved first: an acceptance file from elsewhere must not have other files read through ".." or a link.
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):
        raise FileError(
            f"{path}: the text {name!r} lies outside of the file's folder and is not read; move it into that folder"
        )
    if not file.is_file():
        raise FileError(f"{path}: there is no {name!r} beside it")
    return tuple(passage.strip() for passage in read_text(file) if passage.strip())
