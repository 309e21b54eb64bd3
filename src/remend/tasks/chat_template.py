"""Chat templates: the text that a model reads of a conversation, and the token with which it ends an answer."""

from __future__ import annotations

from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from remend.errors import RequestError
from remend.request import Chat, Message

_QUESTION, _ANSWER = Chat((Message("user", "question"),)), Message("assistant", "the answer")
"""A conversation that shows what the template writes around an answer."""


class ChatTemplate:
    """The chat template of a tokenizer, which may have none.

    Args:
        tokenizer: a model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def opening(self, chat: Chat) -> tuple[str, str]:
        """Return the text before the assistant's answer, special tokens included, and the space between the two.

        Raises:
            RequestError: there is no chat template, or it refuses the conversation.
        """
        lead, _ = self._around_answer
        text = lead.rstrip(" ")
        return self._render(chat) + text, lead[len(text) :]

    @property
    def end(self) -> int | None:
        """The token that ends an answer: the template's, or the tokenizer's end token where the template has none."""
        closing: int | None = self._around_answer[1]
        return self.tokenizer.eos_token_id if closing is None else closing

    @cached_property
    def _around_answer(self) -> tuple[str, int | None]:
        """The text between the generation prompt and the answer, and the first special token after the answer.

        Some templates write more before an answer than their generation prompt has: a space, or an empty block of
        reasoning.
        """
        if self.tokenizer.chat_template is None:
            return "", None
        try:
            prompt, whole = self._render(_QUESTION), self._render(Chat((*_QUESTION.messages, _ANSWER)), prompted=False)
        except RequestError:  # a template that needs longer conversations
            return "", None
        before, _, after = whole.rpartition(_ANSWER.content)
        special = set(self.tokenizer.all_special_ids) | {
            token for token, added in self.tokenizer.added_tokens_decoder.items() if added.content.strip()
        }
        ids = self.tokenizer(after, add_special_tokens=False).input_ids
        closing = next((token for token in ids if token in special), None)
        return before.removeprefix(prompt) if before.startswith(prompt) else "", closing

    def _render(self, chat: Chat, prompted: bool = True) -> str:
        """Return the conversation as the model reads it, with or without the generation prompt."""
        name = type(self.tokenizer).__name__
        if self.tokenizer.chat_template is None:
            raise RequestError(
                f"messages need a chat template, and this tokenizer ({name}) has none: give a prompt instead, load a "
                "chat model with its own tokenizer, or set tokenizer.chat_template"
            )
        messages = chat.to_json()
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted))
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(
                f"the chat template of this tokenizer ({name}) refuses the conversation {str(chat)[:80]!r}: {error}. "
                "Give messages with the roles that it knows, in the order that it expects"
            ) from error
