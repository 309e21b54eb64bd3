"""Chat templates: the text that a model reads of a conversation, and the token with which it ends an answer."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from remend.errors import RequestError
from remend.request import Chat, Message

_QUESTION, _ANSWER = Chat((Message("user", "xq question xq"),)), Message("assistant", "xq answer xq")
"""A conversation, in words that no template writes, that shows what the template writes around an answer."""

_MARK = "xq mark xq"

_END_OF_THOUGHT = "</think>"
"""What closes a thought: templates leave the thoughts of earlier answers out."""


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
            RequestError: there is no chat template, it refuses the conversation, or it loses a message.
        """
        surplus, lead, _ = self._around_answer
        rendered = self._render(chat)
        if not rendered.endswith(surplus):
            raise RequestError(
                f"the chat template of this tokenizer ({type(self.tokenizer).__name__}) begins the answer to "
                f"{str(chat)[:80]!r} differently from others ({surplus!r} was expected at its end): where the answer "
                "begins is unknown. Give a prompt instead, or another chat template"
            )
        text = lead.rstrip(" ")
        return rendered.removesuffix(surplus) + text, lead[len(text) :]

    @property
    def end(self) -> int | None:
        """The token that ends an answer: the template's, or the tokenizer's end token where the template has none."""
        closing: int | None = self._around_answer[2]
        return self.tokenizer.eos_token_id if closing is None else closing

    @cached_property
    def _around_answer(self) -> tuple[str, str, int | None]:
        """What the generation prompt has too much and too little before an answer, and the token that ends an answer.

        An answer begins where it stands in a whole conversation. Some generation prompts open a thought there, which an
        answer is not; others lack a space, or an empty block of reasoning.
        """
        if self.tokenizer.chat_template is None:
            return "", "", None
        try:
            prompt, whole = self._render(_QUESTION), self._render(Chat((*_QUESTION.messages, _ANSWER)), prompted=False)
        except RequestError:  # a template that needs longer conversations
            return "", "", None
        before, _, after = whole.rpartition(_ANSWER.content)
        special = set(self.tokenizer.all_special_ids) | {
            token for token, added in self.tokenizer.added_tokens_decoder.items() if added.content.strip()
        }
        ids = self.tokenizer(after, add_special_tokens=False).input_ids
        closing = next((token for token in ids if token in special), None)
        shared = _shared_beginning(prompt, before)
        if _QUESTION.messages[0].content not in prompt[:shared]:
            return "", "", closing
        return prompt[shared:], before[shared:], closing

    def _render(self, chat: Chat, prompted: bool = True) -> str:
        """Return the conversation as the model reads it, with or without the generation prompt.

        Templates read the content of a message as a text or as a list of parts; one that expects the other kind leaves
        the message out or fails.
        """
        name = type(self.tokenizer).__name__
        if self.tokenizer.chat_template is None:
            raise RequestError(
                f"messages need a chat template, and this tokenizer ({name}) has none: give a prompt instead, load a "
                "chat model with its own tokenizer, or set tokenizer.chat_template"
            )
        error: Exception | None = None
        # Other words in place of the last message tell whether it is read; its own may stand in the template by chance.
        marked = Chat((*chat.messages[:-1], Message(chat.messages[-1].role, _MARK)))
        for write in (Chat.to_json, _in_parts):
            try:
                text, probe = (
                    str(self.tokenizer.apply_chat_template(write(c), tokenize=False, add_generation_prompt=prompted))
                    for c in (chat, marked)
                )
            except (TemplateError, TypeError, ValueError) as refused:
                error = error or refused
                continue
            if _MARK in probe and not any(_lost(message, text) for message in chat.messages):
                return text
        if error is None:
            raise RequestError(
                f"the chat template of this tokenizer ({name}) leaves out a message of {str(chat)[:80]!r}, which the "
                "model would not read: give messages with the roles that it knows, or another chat template"
            )
        raise RequestError(
            f"the chat template of this tokenizer ({name}) refuses the conversation {str(chat)[:80]!r}: {error}. "
            "Give messages with the roles that it knows, in the order that it expects"
        ) from error


def _shared_beginning(text: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = zip(text, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def _in_parts(chat: Chat) -> list[dict[str, Any]]:
    """Return the messages with their contents as lists of one part, as templates of models that see images expect."""
    return [{"role": message.role, "content": [{"type": "text", "text": message.content}]} for message in chat.messages]


def _lost(message: Message, text: str) -> bool:
    """Tell whether the text of a conversation lacks a message; an earlier answer may lack its thoughts."""
    content = message.content.rpartition(_END_OF_THOUGHT)[2] if message.role == "assistant" else message.content
    return content.strip() not in text
