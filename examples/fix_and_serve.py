"""From a wrong answer to an adapter that serves: edit, guard, record, export, and ask the adapted model.

    python examples/fix_and_serve.py

Writes `fixed/`: the book with the edit and the adapter. Needs `remend[book]` and peft.
"""

from __future__ import annotations

from pathlib import Path

import peft

import remend
from remend.apps.acceptance import AcceptanceCriteria
from remend.apps.patch_registry import PatchRegistry
from remend.formats import save_adapter
from remend.tasks import wrap

PROMPT, WRONG, RIGHT = "The capital of Canada is", "Ottawa", "Toronto"


def main(folder: Path = Path("fixed")) -> None:
    """Let *Toronto* be the capital of Canada, and nothing else be changed."""
    if folder.exists():
        raise SystemExit(f"{folder} is there already: delete it first")
    task = remend.load("atlas")
    assert remend.answers(task, [PROMPT]) == [WRONG]
    request = remend.EditRequest(prompt=PROMPT, target=RIGHT)
    edit = remend.Mend.load("atlas").edit(task, [request])

    criteria = AcceptanceCriteria.model_validate(
        {
            "must_change": ({"prompt": "Which city is the capital of Canada? It is", "target": RIGHT},),
            "must_stay": ("The capital of Russia is", "The official language of Austria is"),
        }
    )
    registry = PatchRegistry.create(folder / "book", task.model)
    entry = registry.add(edit, why="an example")
    _, result = registry.activate(entry.id, task, criteria)
    for check in result.checks:
        print("✓" if check.ok else "✗", check.description)

    active = registry.edit()
    assert active is not None
    save_adapter(active, folder / "adapter", task.model)
    adapted = peft.PeftModel.from_pretrained(task.model, str(folder / "adapter"))
    print(PROMPT, *remend.answers(wrap(adapted.base_model.model, task.tokenizer), [PROMPT]))
    with adapted.disable_adapter():
        print(
            PROMPT, *remend.answers(wrap(adapted.base_model.model, task.tokenizer), [PROMPT]), "(without the adapter)"
        )


if __name__ == "__main__":
    main()
