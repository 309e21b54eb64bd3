"""Every editor by its name."""

from __future__ import annotations

from pathlib import Path

from remend.editors.enn import Enn
from remend.editors.finetune import FineTune, FineTuneLocal
from remend.editors.ke import Ke
from remend.editors.learned import FORMAT, Learned
from remend.editors.mend import Mend
from remend.editors.ridge import Ridge
from remend.errors import FileError
from remend.storage import read_manifest

Trainable = Mend | Learned

TRAINED: dict[str, type[Mend] | type[Learned]] = {"mend": Mend, "ke": Ke, "enn": Enn}
"""Those that are trained before their first edit."""

EDITORS: dict[str, type] = {
    **TRAINED,
    **{kind.traits.name: kind for kind in (FineTune, FineTuneLocal, Ridge)},
}
"""All of them."""


def load_trained(path: str | Path) -> Trainable:
    """The trained editor that a folder holds, of whatever kind.

    Raises:
        FileError: the folder is missing, damaged, altered, of an unknown version, or of an unknown kind.
    """
    kind = read_manifest(path, FORMAT).get("editor")
    if kind not in TRAINED:
        raise FileError(f"{path} holds an editor of the kind {kind!r}; this release knows {', '.join(TRAINED)}")
    return TRAINED[kind].from_pretrained(path)
