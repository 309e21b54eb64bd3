"""The folder of a run: a file for each cell with its numbers and settings, so that a stopped run continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from remend.config import differences
from remend.errors import ConfigError
from remend.saved_folders import write_json

from .cell_definitions import Cell, Scale, cell_settings, current_settings
from .testbeds import Testbed, stored_testbeds


class ResultFolder:
    """Stores the figures of cells in a folder, and refuses to mix results of different scales, testbeds or settings.

    Args:
        folder: where.
        testbeds: those that can be computed on; others whose results the folder holds are added.
        scale: how much is computed; a folder belongs to one scale.

    Raises:
        ConfigError: the folder holds results of another scale.
    """

    def __init__(self, folder: Path, testbeds: Mapping[str, Testbed], scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        fingerprints = {file.stem: _read(file) for file in folder.glob("worlds/*.json")}
        self.testbeds = {**stored_testbeds(fingerprints), **testbeds}
        self._checked: set[str] = set()
        file = folder / "about.json"
        # A folder may gain seeds, or widths of models: those do not change the figures that are there.
        described = asdict(replace(scale, seeds=0, memory=[]))
        if file.exists() and _read(file) != described:
            raise ConfigError(
                f"{folder} holds results of another size of run (--quick, --steps): choose another folder for this "
                "one, or give the same"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, described)

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """Return the stored figures of a cell, or under ``failed`` why there are none; None if it was not computed.

        Raises:
            ConfigError: they are of another testbed of that name, or were computed with other settings.
        """
        self.check_testbed(cell.testbed)
        file = self._file(cell)
        if not file.exists():
            return None
        result = _read(file)
        settings = cell_settings(cell, self.scale)
        # The first results were stored without their settings, which were those of today.
        if changed := differences(current_settings(cell, result.get("settings", settings)), settings):
            raise ConfigError(
                f"{file} was computed with another {', '.join(changed)}: delete it to compute {cell.id} anew, or "
                "choose another folder"
            )
        return result

    def write(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Store the result of a cell."""
        write_json(self._file(cell), result)

    def check_testbed(self, name: str) -> None:
        """Store the fingerprint of a user's testbed when it is first used; refuse another testbed of the same name.

        Raises:
            ConfigError: the folder holds results of another testbed of that name.
        """
        if name in self._checked or name not in self.testbeds:
            return
        fingerprint = self.testbeds[name].fingerprint()
        if not fingerprint:
            return
        file = self.folder / "worlds" / f"{name}.json"
        before = _read(file) if file.exists() else fingerprint
        if changed := differences(before, fingerprint):
            raise ConfigError(
                f"{self.folder} holds results of {name} with another {', '.join(changed)}: choose another folder for "
                "this one"
            )
        write_json(file, fingerprint)
        self._checked.add(name)

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.id.replace('/', '-')}.json"


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
