"""KnowEdit's counterfactual edits with their implications: other names of the subject, chains, the relation reversed.

    python benchmarks/real_knowedit.py

What an unedited model could answer is not known: the fact given in the prompt (``in-context``) shows what it makes of
it. Splits are those of ``real_requests.py``. Written to ``build/real/requests/knowedit-SPLIT.jsonl``, the implications
as ``portability``, other questions about the subject as ``near``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from real_requests import SOURCE, SPLITS, split_of
from remend.request import EditRequest, Probe, write_requests

FOLLOWS = {"Subject_Aliasing": "alias", "Reasoning": "chain", "Logical_Generalization": "chain"}
"""KnowEdit's kinds of implications, as columns of ``real.py``."""

STAYS = {"Relation_Specificity": "same_subject"}
"""KnowEdit's prompts that must stay, as columns of ``real.py``."""


def read(rows: Sequence[Mapping[str, Any]], split: str, count: int) -> list[EditRequest]:
    """Return the edits of a split that have implications, in random order."""
    rows = [row for row in rows if split_of(row["subject"]) == split and row["subject"] in row["prompt"]]
    found: dict[str, EditRequest] = {}
    for row in random.Random(split).sample(rows, len(rows)):
        follows = tuple(probes(row["portability"], FOLLOWS))
        identifier = f"{row['subject']}: {row['prompt']}"
        if follows and identifier not in found:
            found[identifier] = EditRequest(
                prompt=row["prompt"],
                target=row["target_new"],
                subject=row["subject"],
                id=identifier,
                portability=follows,
                near=tuple(probes(row["locality"], STAYS)),
            )
    return list(found.values())[:count]


def probes(of_kinds: Mapping[str, Sequence[Mapping[str, str]]], names: Mapping[str, str]) -> Iterator[Probe]:
    """Yield the probes of some of KnowEdit's kinds, each with its column."""
    for kind, name in names.items():
        for row in of_kinds.get(kind, ()):
            if row["prompt"].strip() and row["ground_truth"].strip():
                yield Probe.model_validate({"prompt": row["prompt"], "target": row["ground_truth"], "kind": name})


def main() -> None:
    """Write the requests of both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--split", action="append", choices=SPLITS)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("build/real/requests"))
    arguments = parser.parse_args()
    rows = json.loads((arguments.source / "knowedit" / "wiki_counterfact.json").read_text(encoding="utf-8"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split in arguments.split or ["validation", "test"]:
        write_requests(arguments.out / f"knowedit-{split}.jsonl", read(rows, split, arguments.count))


if __name__ == "__main__":
    main()
