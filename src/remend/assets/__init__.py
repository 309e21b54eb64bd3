"""What ships with the package: the atlas, a small language model with its facts and its editor."""

from __future__ import annotations

from pathlib import Path

ATLAS = "atlas"
"""The name that stands for the built-in model, its editor and its data."""
ATLAS_FOLDER = Path(__file__).parent / "atlas"
"""Holds ``model``, ``editor``, ``facts.tsv``, ``phrasings.json`` and ``SOURCE.md``."""
