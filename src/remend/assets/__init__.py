"""Files that ship with remend: small models that know the same real facts, the facts, and the atlas's editor.

``atlas`` completes sentences (a GPT-2), ``questions`` answers questions (a T5), ``claims`` tells true claims from false
ones (a BERT).
"""

from __future__ import annotations

from pathlib import Path

from remend.errors import ModelError

ATLAS = "atlas"
"""The name of the built-in language model, of its editor and of its data."""
QUESTIONS = "questions"
CLAIMS = "claims"

_HERE = Path(__file__).parent
ATLAS_FOLDER = _HERE / ATLAS
"""Contains ``model``, ``editor``, ``facts.tsv``, ``phrasings.json`` and ``SOURCE.md``."""
QUESTIONS_FOLDER = _HERE / QUESTIONS
CLAIMS_FOLDER = _HERE / CLAIMS
"""Contain ``model`` and ``phrasings.json``; the facts are the atlas's."""
BUILT_IN_MODELS = {
    ATLAS: ATLAS_FOLDER / "model",
    QUESTIONS: QUESTIONS_FOLDER / "model",
    CLAIMS: CLAIMS_FOLDER / "model",
}
"""The folders of the models that can be loaded by name."""


def model_folder(name: str) -> Path:
    """Return the folder of a built-in model.

    Raises:
        ModelError: it is not part of this installation.
    """
    folder = BUILT_IN_MODELS[name]
    # The wheel is kept small and holds the atlas only (pyproject.toml).
    if not folder.is_dir():
        raise ModelError(
            f"the model {name!r} is not part of this installation, since remend's wheel holds only {ATLAS!r}: it is in "
            f"the repository and the source distribution, in src/remend/assets/{name}/model. Give that folder as the "
            "model, or install from there with pip install --editable ."
        )
    return folder
