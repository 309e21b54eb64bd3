"""How a chat model is shown a conversation, and how it ends its answer: what the tokenizer's chat template tells."""

from __future__ import annotations

from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from remend.errors import RequestError
from remend.request import Chat, Message

_ASKED, _ANSWER = Chat((Message("user", "question"),)), Message("assistant", "the answer")
"""A conversation of no meaning, to see what the template writes around an answer."""


class ChatTemplate:
    """The chat template of a tokenizer, if it has one.

    Args:
        tokenizer: a model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def opening(self, chat: Chat) -> tuple[str, str]:
        """The text after which the assistant's answer begins, special tokens included, and the space between them.

        Raises:
            RequestError: there is no chat template, or it refuses the conversation.
        """
        lead, _ = self._around
        begun = lead.rstrip(" ")
        return self._rendered(chat) + begun, lead[len(begun) :]

    @property
    def end(self) -> int | None:
        """The token that ends an answer; the tokenizer's end token where the template tells none."""
        closing: int | None = self._around[1]
        return self.tokenizer.eos_token_id if closing is None else closing

    @cached_property
    def _around(self) -> tuple[str, int | None]:
        """What stands between the prompt for an answer and the answer, and the first special token after it.

        Some templates write more before an answer than they prompt for: a space, or the empty thoughts of an answer
        that was not thought about.
        """
        if self.tokenizer.chat_template is None:
            return "", None
        try:
            prompt, whole = self._rendered(_ASKED), self._rendered(Chat((*_ASKED.messages, _ANSWER)), prompted=False)
        except RequestError:  # a template for longer conversations only: it cannot be asked
            return "", None
        before, _, after = whole.rpartition(_ANSWER.content)
        special = set(self.tokenizer.all_special_ids) | {
            token for token, added in self.tokenizer.added_tokens_decoder.items() if added.content.strip()
        }
        ids = self.tokenizer(after, add_special_tokens=False).input_ids
        closing = next((token for token in ids if token in special), None)
        return before.removeprefix(prompt) if before.startswith(prompt) else "", closing

    def _rendered(self, chat: Chat, prompted: bool = True) -> str:
        """The conversation as the model reads it, with or without the beginning of an answer."""
        kind = type(self.tokenizer).__name__
        if self.tokenizer.chat_template is None:
            raise RequestError(
                f"messages need a chat template, and this tokenizer ({kind}) has none: give a prompt instead, load a "
                "chat model with its own tokenizer, or set tokenizer.chat_template"
            )
        messages = chat.to_json()
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted))
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(
                f"the chat template of this tokenizer ({kind}) refuses the conversation {str(chat)[:80]!r}: {error}. "
                "Give messages with the roles that it knows, in the order that it expects"
            ) from error
