"""What a tokenizer cannot write of a text, and reads as its token for unknown text instead."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remend.request import Prompt
    from remend.tasks.base import Task

MAX_NAMED = 8
"""How many pieces of text a message names."""


def unknown_pieces(tokenizer: Any, text: str) -> tuple[str, ...]:
    """Return the pieces of a text (characters or words) that the tokenizer reads as its unknown token, each once."""
    unknown, special = tokenizer.unk_token_id, set(tokenizer.all_special_tokens)
    if unknown is None or not text:
        return ()
    if not tokenizer.is_fast:  # it does not tell which token is of which piece, so they are tried one by one
        pieces = re.findall(r"\w+|[^\w\s]", text)
        found = [piece for piece in pieces if unknown in tokenizer(piece, add_special_tokens=False).input_ids]
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = zip(encoded.input_ids, encoded["offset_mapping"], strict=True)
        found = [text[start:end].strip(" ") for token, (start, end) in places if token == unknown]
    # A text may hold the unknown token on purpose; and of some tokenizers (GPT-2) it is also the end token.
    return tuple(dict.fromkeys(piece for piece in found if piece and piece not in special))


def warn_of_unknown_text(task: Task, prompts: Iterable[Prompt], whose: str) -> None:
    """Warn once of all that the tokenizer cannot write in some prompts, if there is anything.

    Args:
        task: the model that is asked.
        prompts: the prompts.
        whose: what the prompts are, for the message.
    """
    lossy = [pieces for prompt in dict.fromkeys(prompts) if (pieces := task.unknown_text(prompt))]
    if lossy:
        named = list(dict.fromkeys(piece for pieces in lossy for piece in pieces))
        warnings.warn(
            f"the tokenizer cannot write {named_pieces(named)}, and the model reads an unknown token in place of "
            f"each: {len(lossy)} of {whose} are other texts to it, and their answers tell little",
            stacklevel=3,
        )


def named_pieces(pieces: Sequence[str]) -> str:
    """Return pieces of text for a message, single characters with their code points."""
    shown = [f"{p!r} (U+{ord(p):04X})" if len(p) == 1 else repr(p[:40]) for p in pieces[:MAX_NAMED]]
    return ", ".join(shown) + (f" and {more} more" if (more := len(pieces) - MAX_NAMED) > 0 else "")
