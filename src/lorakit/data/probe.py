"""A template is tried on two short conversations before it is used: a broken one must not cost a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.data.encode import encode_batch
from lorakit.data.rendering import Policy
from lorakit.data.sample import Message, Sample
from lorakit.data.templates import Template
from lorakit.errors import DataError
from lorakit.ops.loss import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "Seventeen."
_TURNS = (Message("user", "How many?"), Message("assistant", _ANSWER))
_PROBES = (_TURNS, (Message("system", "Count."), *_TURNS))
_POLICY = Policy(cutoff_len=1 << 30)


def check_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> int:
    """Refuse a template that no model could be trained with; returns the token that ends an answer.

    Raises:
        DataError: it eats the answer or the token that ends it, begins twice, or does not ask for an answer.
    """
    probe = _accepted(template)
    question, text = probe.messages[:-1], template.render(probe.messages)
    asked, unasked = template.render(question, ask=True), template.render(question)
    if _ANSWER not in text[len(asked) :] and _ANSWER in text:
        raise _broken(template, "asks for an answer in other words than it writes before one")
    if _ANSWER not in text:
        raise _broken(template, "leaves the assistant's words out")
    (encoded,) = encode_batch(tokenizer, [probe], _POLICY, template)
    (row,) = encoded.whole
    bos = tokenizer.bos_token_id
    if bos is not None and row.ids[:2] == (bos, bos):
        raise _broken(template, f"begins a text with {tokenizer.bos_token} twice")
    before = text[len(asked) : text.index(_ANSWER, len(asked))]
    if asked == unasked and before.strip():
        raise _broken(template, f"writes {before!r} before an answer, but not when it asks for one")
    return max((i, label) for i, label in enumerate(row.labels) if label != IGNORE)[1]


def stop_ids(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """The tokens that end generation: the one that ended every answer in training, and the tokenizer's own."""
    if not template.source:
        return [tokenizer.eos_token_id]
    return sorted({check_template(tokenizer, template), tokenizer.eos_token_id})


def _accepted(template: Template) -> Sample:
    """The first probe that the template takes: some insist on a system message, some refuse one."""
    refusal: DataError | None = None
    for messages in _PROBES:
        try:
            template.render(messages)
            return Sample(messages, "")
        except DataError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _broken(template: Template, what: str) -> DataError:
    which = "the tokenizer's chat template" if template.name == "auto" else f"the template {template.name}"
    return DataError(
        f"{which} {what}: a model trained with it would not answer", remedy="name another one with template:"
    )
