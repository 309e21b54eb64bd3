"""Where an edit should act, and where not: mentions of a subject within texts, and names that end as it does.

At the last token of names that end alike, a model's inner states are the most alike. Those of one subject differ most
between the beginning of a text and its middle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from remend.editors.locate_then_edit.subject_prompts import located_subject
from remend.request import Chat, EditRequest, TextPair, in_form_of
from remend.tasks.base import Example, Task

BEGINNINGS = (
    *("President of", "Prime Minister of", "University of", "History of", "Bank of", "The old", "The new", "A little"),
    *("Saint", "Maria", "John", "General", "Mount", "Black", "Prince", "Doctor"),
)
"""What such names begin with."""


MENTIONS = (
    *("A picture of {}", "The history of {}", "They wrote about {}", "In the case of {}", "The first part of {}"),
    *("Here is what people say about {}", "It was the year in which {}", "Yesterday we talked about {}"),
)
"""Texts in which a subject stands, whatever it is."""


def mentions(task: Task, request: EditRequest) -> Iterator[tuple[Example, int]]:
    """Yield texts that mention a request's subject, with the position of its last token."""
    if task.generates:
        for text in MENTIONS:
            prompt = in_form_of(request.prompt, text.replace("{}", str(request.subject)))
            yield located_subject(task, prompt, str(request.subject))


def lookalikes(task: Task, request: EditRequest) -> Iterator[tuple[Example, int]]:
    """Yield the request's prompt about names that end in the subject's last word, with the position of that word's end.

    A subject of one word has none: a name that ends in it is about it, too.
    """
    subject = str(request.subject)
    *beginning, last = subject.split()
    if not beginning or isinstance(request.prompt, TextPair):
        return
    text = request.prompt.messages[-1].content if isinstance(request.prompt, Chat) else str(request.prompt)
    for other in BEGINNINGS:
        name = f"{other} {last}"
        if name.casefold() == subject.casefold():
            continue
        changed = re.sub(re.escape(subject), name.replace("\\", r"\\"), text, flags=re.IGNORECASE)
        if changed != text:
            yield located_subject(task, in_form_of(request.prompt, changed), name)
