r"""A sample as text, and which stretches of it carry loss.

    <|im_start|>user\n8128 Drive<|im_end|>\n<|im_start|>assistant\n{"number":"8128"}<|im_end|>\n
    ────────────── no loss ───────────────────────────────────── ── loss, and the end ──── ─ no

An answer begins where the template stops when it is asked for one. A template that writes a conversation
otherwise once it goes on (dropping earlier reasoning, say) gives one text for each answer, with the history
as generation will see it, and only that answer carries loss in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.config.names import LongRows
from lorakit.data.sample import Message, Sample
from lorakit.data.templates import Template
from lorakit.errors import DataError


@dataclass(frozen=True)
class Policy:
    """What carries loss, and what becomes of rows that are too long.

    Attributes:
        cutoff_len: longest row in tokens.
        train_on_prompt: everything carries loss, not the answers alone.
        mask_history: of the answers, only the last one carries loss.
        long_rows: truncate (so that the answer stays), drop, or split into rows of at most cutoff_len.
    """

    cutoff_len: int
    train_on_prompt: bool = False
    mask_history: bool = False
    long_rows: LongRows = "truncate"

    def trains(self, messages: Sequence[Message], turn: int) -> bool:
        """Whether a turn carries loss: as its row says, else as the policy has it."""
        message = messages[turn]
        if message.train is not None:
            return message.train
        if message.role != "assistant":
            return self.train_on_prompt
        return not self.mask_history or all(later.role != "assistant" for later in messages[turn + 1 :])


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``stop``; of an answer, the loss ends with its last special token."""

    start: int
    stop: int
    train: bool
    answer: bool = True


@dataclass(frozen=True)
class Rendered:
    """A text, the turns in it whose loss is not what the rest has, and where tokenising starts anew."""

    text: str
    spans: tuple[Span, ...]
    cuts: tuple[int, ...] = ()
    rewritten: bool = False  # one of several texts of a conversation that the template rewrites


def render_sample(template: Template, sample: Sample, policy: Policy, *, bos: str, eos: str) -> list[Rendered]:
    """The texts of a sample: one, or one for each answer that carries loss if the template rewrites history.

    Raises:
        DataError: the template refuses the sample, or an answer cannot be found in what it writes.
    """
    if sample.kind != "chat":
        prompt, answer = _plain_parts(sample, bos)
        text = prompt + answer + eos
        train = policy.trains(sample.messages, len(sample.messages) - 1)
        return [Rendered(text, (Span(len(prompt), len(text), train),), (len(prompt),) if prompt else ())]
    whole = _render_whole(template, sample, policy)
    return [whole] if whole else _render_each(template, sample, policy)


def render_prompt(template: Template, sample: Sample, *, bos: str) -> Rendered:
    """What the model is asked with: everything before the last answer, or all of it if that is a question."""
    if sample.kind != "chat":
        return Rendered(_plain_parts(sample, bos)[0], ())
    messages = sample.messages
    if messages[-1].role == "assistant":
        messages = messages[:-1]
    write = _Writer(template, sample)
    text = write(messages, ask=True)
    return Rendered(text, (), _cuts(template, write, messages, text))


def _plain_parts(sample: Sample, bos: str) -> tuple[str, str]:
    """Prompt and answer as they stand."""
    *before, answer = sample.messages
    return bos + "".join(message.content for message in before), answer.content


class _Writer:
    """Renders beginnings of one conversation, each only once."""

    def __init__(self, template: Template, sample: Sample) -> None:
        self._template, self._sample = template, sample
        self._written: dict[tuple[int, bool], str] = {}

    def __call__(self, messages: Sequence[Message], *, ask: bool) -> str:
        key = (len(messages), ask)
        if key not in self._written:
            self._written[key] = self._template.render(
                messages, tools=self._sample.tools, ask=ask, place=self._sample.place
            )
        return self._written[key]


def _render_whole(template: Template, sample: Sample, policy: Policy) -> Rendered | None:
    """The whole conversation as one text; None if the template rewrites it as it goes on."""
    messages, write = sample.messages, _Writer(template, sample)
    text = write(messages, ask=False)
    spans = []
    for turn, message in enumerate(messages):
        train = policy.trains(messages, turn)
        answer = message.role == "assistant"
        if train == policy.train_on_prompt and not (answer and train):
            continue
        before = write(messages[:turn], ask=answer) if turn else ""
        after = write(messages[: turn + 1], ask=False)
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            return None
        spans.append(Span(len(before), len(after), train, answer))
    return Rendered(text, tuple(spans), _cuts(template, write, messages, text))


def _render_each(template: Template, sample: Sample, policy: Policy) -> list[Rendered]:
    """One text for each answer that carries loss, ending with it."""
    messages, write = sample.messages, _Writer(template, sample)
    if policy.train_on_prompt:
        raise DataError(
            "the chat template rewrites earlier turns: train_on_prompt would train on many versions of them",
            place=sample.place,
            remedy="leave train_on_prompt out, or choose another template",
        )
    texts = []
    for turn, message in enumerate(messages):
        trained = policy.trains(messages, turn)
        if message.role != "assistant" and message.train:
            raise _unfound(sample, f"turn {turn + 1}, which is to carry loss,")
        if message.role != "assistant" or not trained:
            continue
        before, text = write(messages[:turn], ask=True), write(messages[: turn + 1], ask=False)
        if not text.startswith(before) or len(text) == len(before):
            raise _unfound(sample, "an answer")
        cuts = _cuts(template, write, messages[: turn + 1], text)
        texts.append(Rendered(text, (Span(len(before), len(text), True),), cuts, rewritten=True))
    return texts


def _cuts(template: Template, write: _Writer, messages: Sequence[Message], text: str) -> tuple[int, ...]:
    """Where the answers in ``text`` begin, if the template wants them tokenised apart."""
    answers = [turn for turn, m in enumerate(messages) if m.role == "assistant"] if template.cuts else []
    starts = [write(messages[:turn], ask=True) for turn in answers]
    return tuple(len(start) for start in starts if text.startswith(start))


def _unfound(sample: Sample, what: str) -> DataError:
    return DataError(
        f"the chat template does not write {what} after what it asks the model with",
        place=sample.place,
        remedy="choose another template, or split the conversation into rows of one question and one answer",
    )
