"""What ships with the package: small models that know the same real facts, and the atlas's editor.

``atlas`` completes sentences (a GPT-2), ``questions`` answers questions (a T5), ``claims`` tells true claims from false
ones (a BERT).
"""

from __future__ import annotations

from pathlib import Path

ATLAS = "atlas"
"""The name that stands for the built-in model, its editor and its data."""
QUESTIONS = "questions"
CLAIMS = "claims"

_HERE = Path(__file__).parent
ATLAS_FOLDER = _HERE / ATLAS
"""Holds ``model``, ``editor``, ``facts.tsv``, ``phrasings.json`` and ``SOURCE.md``."""
QUESTIONS_FOLDER = _HERE / QUESTIONS
CLAIMS_FOLDER = _HERE / CLAIMS
"""Hold ``model`` and ``phrasings.json``; the facts are the atlas's."""
BUILT_IN = {ATLAS: ATLAS_FOLDER, QUESTIONS: QUESTIONS_FOLDER, CLAIMS: CLAIMS_FOLDER}
"""The folders of all that can be named in place of a model or a file of requests."""
