"""Do the phrasings of a set ask the same? A hundred of them, to be read and judged by a person.

    make real MODELS=smollm2 && python benchmarks/judge_phrasings.py

Makes the phrasings of ``remend expand`` for the prompts of the configuration, draws some, and writes them to a table
(``results/judge_phrasings.tsv``), whose last column a person fills in: ``yes`` or ``no``. A phrasing asks the same if
its right answer is the right answer to the prompt, for every subject of that kind. What was judged before is kept; the
shares, by how a phrasing was made, are printed and written once no line is left blank.
"""

from __future__ import annotations

import csv
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import remend
from common import parser, start, write
from remend.editors import make_or_load
from remend.editors.locate_then_edit.fit import Fit
from remend.expansion import ExpandConfig
from remend.expansion.phrasings import phrasings
from remend.expansion.premise import Premise
from remend.saved_folders import write_text

COLUMNS = ("prompt", "phrasing", "made", "sure", "same")


def rows_of(config: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield every phrasing of every prompt."""
    task = remend.load(config["model"])
    editor = make_or_load(Fit.info.name, task, (), config["seed"])
    assert isinstance(editor, Fit)
    assert editor.questions is not None
    for prompt, target, subject in (*config["statements"], *config["questions"]):
        premise = Premise.of(task, remend.EditRequest(prompt=prompt, target=target, subject=subject), editor.questions)
        for item in phrasings(premise, ExpandConfig().phrasings):
            yield {"prompt": prompt, "phrasing": str(item.prompt), "made": item.made, "sure": f"{item.sure:.2f}"}


def judged_before(table: Path) -> dict[tuple[str, str], str]:
    """Return what was judged, by prompt and phrasing."""
    if not table.exists():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {(row["prompt"], row["phrasing"]): row["same"] for row in csv.DictReader(file, delimiter="\t")}


def main() -> None:
    """Write the table, or what was judged."""
    arguments = parser(__doc__, "judge_phrasings").parse_args()
    config = start(arguments)
    table = arguments.out.with_suffix(".tsv")
    before = judged_before(table)
    rows = list(rows_of(config))
    prompts = len({row["prompt"] for row in rows})
    drawn = random.Random(config["seed"]).sample(rows, min(config["count"], len(rows)))
    for row in drawn:
        row["same"] = before.get((row["prompt"], row["phrasing"]), "")
    drawn.sort(key=lambda row: (row["prompt"], row["phrasing"]))
    write_text(table, "".join("\t".join(line) + "\n" for line in (COLUMNS, *([r[c] for c in COLUMNS] for r in drawn))))
    if blank := sum(row["same"] not in ("yes", "no") for row in drawn):
        raise SystemExit(f"{blank} of {len(drawn)} phrasings are not judged yet: write yes or no into {table}")
    shares: dict[str, list[bool]] = defaultdict(list)
    for row in drawn:
        for kind in ("all", row["made"].split(":")[0]):
            shares[kind].append(row["same"] == "yes")
    result = {kind: {"same": sum(found) / len(found), "judged": len(found)} for kind, found in sorted(shares.items())}
    for kind, found in result.items():
        print(f"{kind}: {found['same']:.3f} of {found['judged']}")
    write(arguments.out, config, {"phrasings": len(rows), "prompts": prompts, "shares": result})


if __name__ == "__main__":
    main()
