"""What is refused before an edit is made: prompts that the model cannot read, requests that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence

from remend.errors import RequestError
from remend.request import EditRequest
from remend.tasks.base import EncodedInput, Task
from remend.tasks.unknown_text import named_pieces


def refuse_unreadable(task: Task, requests: Sequence[EditRequest]) -> None:
    """Refuse prompts of which the tokenizer reads a part as unknown: the edit would change whatever reads so.

    Raises:
        RequestError: there is one; the message names the characters.
    """
    lossy = [(request, pieces) for request in requests if (pieces := task.unknown_text(request.prompt))]
    if lossy:
        request, pieces = lossy[0]
        more = f" ({len(lossy)} of {len(requests)} requests have such a prompt)" if len(requests) > 1 else ""
        raise RequestError(
            f"the tokenizer cannot write {named_pieces(pieces)} of the prompt {str(request.prompt)[:40]!r}{more}. An "
            "edit would change every prompt that has unknown text there: leave it away or write it otherwise, or edit "
            "a model whose tokenizer knows it"
        )


def refuse_conflicts(task: Task, requests: Sequence[EditRequest]) -> None:
    """Refuse two requests for one edit that want different answers to the same prompt, which no model can give.

    Prompts are the same where the model reads the same, targets where they are the same answer
    (:meth:`Task.same_answer`).

    Raises:
        RequestError: there are two; the message names both, counted from 1.
    """
    firsts: dict[EncodedInput, tuple[int, EditRequest]] = {}
    for number, request in enumerate(requests, start=1):
        first_number, first = firsts.setdefault(task.encode_input(request.prompt), (number, request))
        if first.target != request.target and not task.same_target(request.prompt, first.target, request.target):
            raise RequestError(
                f"requests {first_number} and {number} want different answers to {str(request.prompt)!r}: "
                f"{first.target!r} and {request.target!r}. One edit of both makes the model give one of them at the "
                "most: leave one of them away, or make an edit of each"
            )
