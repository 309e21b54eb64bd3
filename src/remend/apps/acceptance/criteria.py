"""The acceptance file: what is asked of an edit, as JSON that people write and reviewers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from remend.errors import ConfigError, FileError, nearest
from remend.request import Probe, Prompt
from remend.serialization import parse_json

Share = Annotated[float, Field(ge=0, le=1)]
TEXT_TOKENS = 4_096
"""Tokens of a text on which perplexity is measured, at most."""


class Perplexity(BaseModel):
    """An ordinary text that the edited model must still predict.

    Attributes:
        text: its passages.
        file: or a file that holds them, in the acceptance file's folder, parted by blank lines.
        most: times the perplexity before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: tuple[str, ...] = ()
    file: str | None = None
    most: Annotated[float, Field(ge=1)] = 1.05

    @model_validator(mode="after")
    def _one_text(self) -> Perplexity:
        if bool(self.text) == (self.file is not None):
            raise ValueError("give text, a list of passages, or file, the name of one that holds them")
        return self


class AcceptanceCriteria(BaseModel):
    """What is asked of an edit. Shares are of prompts; a request's own are in the edit itself.

    Attributes:
        must_change: prompts with the answers that they must get, beside the requests' own.
        must_stay: prompts whose answers must be as before, or the ones named.
        takes: the least share of the requests' prompts, and of ``must_change``, that get the answer they should.
        follows: of the requests' paraphrases.
        stays: of ``must_stay``.
        near, far: of the requests' near and far prompts that are answered as before.
        elsewhere: of the model's choices on input of its own that stay.
        perplexity: a text that must still be predicted; causal language models only.
        size: the most that ‖ΔW‖ / ‖W‖ (Frobenius) may be in any matrix.

    What is asked by name is not met where there is nothing to measure it on; of what is not named that is only said.

    The last three tell a model that was ruined from one that was edited, of any size. A large model's choices on its
    own input hardly change at all (0.98 is much to ask of a small one), and its edits are far smaller than its
    matrices: ask more of one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    must_change: tuple[Probe, ...] = ()
    must_stay: tuple[Prompt | Probe, ...] = ()
    takes: Share = 1.0
    follows: Share = 0.75
    stays: Share = 1.0
    near: Share = 0.75
    far: Share = 0.95
    elsewhere: Share = 0.5
    perplexity: Perplexity | None = None
    size: Annotated[float, Field(gt=0)] = 1.0

    @staticmethod
    def read(path: str | Path) -> AcceptanceCriteria:
        """An acceptance file; the text that it names is read with it.

        Raises:
            FileError: it is missing, or is not JSON, or its text is not in its folder or cannot be read.
            ConfigError: a key is unknown (the nearest known one is named), or a value is not what it should be.
        """
        path = Path(path)
        try:
            content = parse_json(path.read_bytes())
        except OSError as error:
            raise FileError(
                f"cannot read {path}: {error.strerror}; give a JSON file of what is asked of an edit"
            ) from None
        except (ValueError, RecursionError) as error:
            raise FileError(f"{path} is not JSON ({error})") from None
        try:
            found = AcceptanceCriteria.model_validate_json(json.dumps(content))
        except ValidationError as error:
            raise ConfigError(f"{path}: {_explained(error, content)}") from None
        if found.perplexity is None or found.perplexity.file is None:
            return found
        passages = _passages(path, found.perplexity.file)
        return found.model_copy(update={"perplexity": Perplexity(text=passages, most=found.perplexity.most)})


STANDARD = AcceptanceCriteria()
"""What is asked where nobody says more."""


def _explained(error: ValidationError, content: Any) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        last = str(first["loc"][-1])
        known = Perplexity.model_fields if "perplexity" in first["loc"][:-1] else AcceptanceCriteria.model_fields
        return f"there is no {key!r}; {nearest(last, known)}"
    what = first["msg"].removeprefix("Value error, ")
    return f"{key}: {what}" if key else f"{what}; it is a {type(content).__name__}"


def _passages(path: Path, name: str) -> tuple[str, ...]:
    """The passages of a file beside the acceptance file."""
    from remend.data import read_text

    folder = path.resolve().parent
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):
        raise FileError(f"{path}: the text {name!r} lies outside of the file's folder, and is not read; put it there")
    if not file.is_file():
        raise FileError(f"{path}: there is no {name!r} beside it")
    return tuple(passage.strip() for passage in read_text(file) if passage.strip())
