"""Rendering a conversation by the tokenizer's own chat template. Training and generation share this file.

transformers renders templates in a sandbox of jinja2 that cannot change what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lorakit.data.sample import Message
from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool, place: str | None = None
) -> str:
    """The conversation as text; with ``ask``, ended by what makes the model answer.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the model's tokenizer has no chat template",
            place=place,
            remedy="take an instruction-tuned model, whose tokenizer brings its template",
        )
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}", place=place) from error
    assert isinstance(text, str)
    return text
