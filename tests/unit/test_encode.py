"""What carries loss: the assistant's words and the token that ends its turn, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorakit.data.encode import DataSummary, Row, encode_all, encode_batch, prompt_ids
from lorakit.data.rendering import Policy
from lorakit.data.sample import Message, Role, Sample
from lorakit.data.templates import find_template
from lorakit.errors import DataError, ModelError
from lorakit.ops.loss import IGNORE

# What says the assistant's words for transformers' own mask: the template of tiny_llama with markers.
MARKED = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As families do that hide the reasoning of all turns but the last.
REWRITING = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END = "<|im_end|>"


@pytest.fixture(scope="module")
def shared_tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    """A fresh one, to be changed."""
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def trimming(tiny_llama: Path) -> PreTrainedTokenizerBase:
    """Offsets as Llama 3's and GPT-2's tokenizers give them: without the spaces of a token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def conversation(*contents: str, system: str | None = None) -> Sample:
    """Contents of the user and the assistant in turns."""
    roles: tuple[Role, Role] = ("user", "assistant")
    first = [] if system is None else [Message("system", system)]
    turns = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    return Sample((*first, *turns), "rows.jsonl:1")


def encode(tokenizer: PreTrainedTokenizerBase, sample: Sample, **policy: Any) -> Row:
    """The one row of a sample, uncut."""
    ((row,),) = (
        one.whole for one in encode_batch(tokenizer, [sample], Policy(512, **policy), find_template(tokenizer))
    )
    return row


def labelled(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    return tokenizer.decode([label for label in row.labels if label != IGNORE])


class TestExact:
    def test_one_question_and_answer(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        row = encode(shared_tokenizer, conversation("Hi", "Yes."))
        prompt = shared_tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n").input_ids
        answer = shared_tokenizer("Yes.<|im_end|>").input_ids
        newline = shared_tokenizer("\n").input_ids
        assert row.ids == (*prompt, *answer, *newline)
        assert row.labels == (*[IGNORE] * len(prompt), *answer, *[IGNORE] * len(newline))
        assert answer[-1] == shared_tokenizer.eos_token_id
        assert row.supervised == len(answer)

    def test_two_questions_under_a_system_message(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        sample = conversation("A", "B 1", "C", "D 22", system="S")
        row = encode(shared_tokenizer, sample)
        parts = [
            ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n", False),
            ("B 1<|im_end|>", True),
            ("\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n", False),
            ("D 22<|im_end|>", True),
            ("\n", False),
        ]
        pieces = [(shared_tokenizer(text).input_ids, loss) for text, loss in parts]
        assert row.ids == tuple(i for ids, _ in pieces for i in ids)
        assert row.labels == tuple(i if loss else IGNORE for ids, loss in pieces for i in ids)
        assert labelled(shared_tokenizer, row) == "B 1<|im_end|>D 22<|im_end|>"

    def test_the_prompt_is_what_generation_asks_with(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        sample = conversation("A", "B", "C", "D")
        row = encode(shared_tokenizer, sample)
        asked = prompt_ids(shared_tokenizer, sample, find_template(shared_tokenizer))
        assert row.ids[: len(asked)] == tuple(asked)
        assert set(row.labels[len(asked) : -1]).isdisjoint({IGNORE})

    def test_the_first_token_is_never_counted(self) -> None:
        assert Row((5, 6, 7), (5, 6, IGNORE)).supervised == 1


# Whitespace in front of an answer melts into the template's newline, whose token then carries loss, too.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "<|" not in text)
SAID = st.tuples(st.sampled_from(["a", "é", "😀", "字", "{", "\u200d", "<", "👩🏽‍🚒", "ﬁ"]), TEXT).map("".join)
SPACED = st.text(st.sampled_from(["x", " ", "\n", "\t", "é", "😀", '"']), max_size=30).map("a".__add__)
ANSWER = SAID | SPACED
CONVERSATIONS = st.builds(
    lambda pairs, system: conversation(*(turn for pair in pairs for turn in pair), system=system),
    st.lists(st.tuples(SAID | TEXT.map(lambda t: f"{t}."), ANSWER), min_size=1, max_size=3),
    st.none() | SAID,
)
FAST = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
)


def check_labels(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> None:
    row = encode(tokenizer, sample)
    said = [m.content for m in sample.messages if m.role == "assistant"]
    assert labelled(tokenizer, row) == "".join(text + END for text in said)
    assert tokenizer.decode(row.ids) == find_template(tokenizer).render(sample.messages)
    assert all(label in (IGNORE, i) for i, label in zip(row.ids, row.labels, strict=True))


class TestAnyConversation:
    @FAST
    @given(sample=CONVERSATIONS)
    def test_the_labels_spell_the_answers(
        self, shared_tokenizer: PreTrainedTokenizerBase, sample: Sample
    ) -> None:
        check_labels(shared_tokenizer, sample)

    @FAST
    @given(sample=CONVERSATIONS)
    def test_whatever_offsets_the_tokenizer_gives(
        self, trimming: PreTrainedTokenizerBase, sample: Sample
    ) -> None:
        check_labels(trimming, sample)

    @FAST
    @given(sample=CONVERSATIONS)
    def test_transformers_marks_the_same_tokens(
        self, shared_tokenizer: PreTrainedTokenizerBase, sample: Sample
    ) -> None:
        row = encode(shared_tokenizer, sample)
        oracle = shared_tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in sample.messages],
            chat_template=MARKED,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert row.ids == tuple(oracle["input_ids"])
        assert [label != IGNORE for label in row.labels] == [bool(m) for m in oracle["assistant_masks"]]

    def test_the_real_tokenizer(self, smollm2: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        answers = ['{\n    "zip":  "62701"\n}', "a   ", "a\n\n\n  b", "👩🏽‍🚒 é \u2028 字", "<p>"]
        for answer in answers:
            check_labels(tokenizer, conversation("Why  ?", answer, " \n?", answer, system="S"))


def encode_with(
    tokenizer: PreTrainedTokenizerBase, samples: list[Sample], cutoff: int, **policy: Any
) -> tuple[list[Row], DataSummary]:
    return encode_all(tokenizer, samples, Policy(cutoff, **policy), find_template(tokenizer))


class TestLongRows:
    SAMPLES = (
        conversation("A", "B"),
        conversation("A", "B " * 100),
        conversation("A " * 100, "B"),
        conversation("A", "B", "C " * 100, "D"),
    )

    def test_truncated_so_that_an_answer_stays(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        whole = [encode(shared_tokenizer, sample) for sample in self.SAMPLES]
        cutoff = len(whole[0].ids) + 8
        rows, summary = encode_with(shared_tokenizer, list(self.SAMPLES), cutoff)
        # The third keeps its first token, which begins every text here, and its end.
        end = len(whole[2].ids) - 1  # the line break after the answer goes
        tail = slice(end - cutoff + 1, end)
        third = Row((whole[2].ids[0], *whole[2].ids[tail]), (whole[2].labels[0], *whole[2].labels[tail]))
        kept = [Row(row.ids[:cutoff], row.labels[:cutoff]) for row in whole]
        assert rows == [kept[0], kept[1], third, kept[3]]
        assert labelled(shared_tokenizer, rows[2]) == "B<|im_end|>"
        assert summary == DataSummary(
            rows=4,
            tokens=len(whole[0].ids) + 3 * cutoff,
            supervised_tokens=sum(row.supervised for row in rows),
            longest=cutoff,
            truncated=3,
            whole_tokens=sum(len(row.ids) for row in whole),
        )

    def test_an_endless_answer_to_an_endless_question(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        (row,), _ = encode_with(shared_tokenizer, [conversation("A " * 100, "B " * 100)], 40)
        assert len(row.ids) == 40
        assert 18 <= row.supervised <= 21

    def test_dropped(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        rows, summary = encode_with(shared_tokenizer, list(self.SAMPLES), 30, long_rows="drop")
        assert rows == [encode(shared_tokenizer, self.SAMPLES[0])]
        assert (summary.rows, summary.dropped, summary.too_long, summary.truncated) == (1, 3, 3, 0)

    def test_split_without_losing_a_label(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        whole = encode(shared_tokenizer, self.SAMPLES[1])
        rows, summary = encode_with(shared_tokenizer, [self.SAMPLES[1]], 16, long_rows="split")
        assert all(len(row.ids) <= 16 for row in rows)
        assert summary.split == len(rows) > 5
        assert summary.supervised_tokens == whole.supervised
        assert [i for row in rows for i in row.labels[1:] if i != IGNORE] == [
            i for i in whole.labels if i != IGNORE
        ]

    def test_a_row_of_exactly_the_cutoff_stays_whole(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        row = encode(shared_tokenizer, conversation("A", "B"))
        (kept,), summary = encode_with(shared_tokenizer, [conversation("A", "B")], len(row.ids))
        assert (kept, summary.truncated) == (row, 0)

    def test_no_row_left(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        samples = [conversation("A " * 100, "B")] * 3
        message = "no row is left to train on: 3 of 3 are too long, 0 carry no loss"
        with pytest.raises(DataError, match=message) as caught:
            encode_with(shared_tokenizer, samples, 16, long_rows="drop")
        assert caught.value.remedy == "raise cutoff_len (it is 16)"


class TestPolicy:
    TALK = conversation("A", "B", "C", "D", system="S")

    def test_the_last_answer_alone(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        row = encode(shared_tokenizer, self.TALK, mask_history=True)
        assert labelled(shared_tokenizer, row) == "D<|im_end|>"

    def test_the_prompt_too(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        row = encode(shared_tokenizer, self.TALK, train_on_prompt=True)
        assert row.labels == row.ids

    def test_turns_that_the_row_leaves_out(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        turns = (*self.TALK.messages[:2], Message("assistant", "B", train=False), *self.TALK.messages[3:])
        assert labelled(shared_tokenizer, encode(shared_tokenizer, Sample(turns, ""))) == "D<|im_end|>"
        row = encode(shared_tokenizer, Sample(turns, ""), train_on_prompt=True)
        said = labelled(shared_tokenizer, row)
        assert (
            "B" not in said
            and said.startswith("<|im_start|>system\nS<|im_end|>")
            and said.endswith("D<|im_end|>\n")
        )

    def test_turns_that_the_row_adds(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        turns = (Message("user", "A", train=True), Message("assistant", "B", train=False))
        row = encode(shared_tokenizer, Sample(turns, ""))
        assert labelled(shared_tokenizer, row) == "<|im_start|>user\nA<|im_end|>\n"

    def test_rows_without_loss_are_dropped_and_counted(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        silent = Sample((Message("user", "A"), Message("assistant", "B", train=False)), "")
        rows, summary = encode_with(shared_tokenizer, [silent, self.TALK], 512)
        assert (len(rows), summary.dropped, summary.masked) == (1, 1, 1)
        with pytest.raises(DataError, match="1 carry no loss"):
            encode_with(shared_tokenizer, [silent], 512)

    def test_plain_text_and_completions(self, shared_tokenizer: PreTrainedTokenizerBase) -> None:
        text = Sample((Message("assistant", "All of it."),), "", kind="text")
        row = encode(shared_tokenizer, text)
        assert row.ids == row.labels == tuple(shared_tokenizer("All of it.<|im_end|>").input_ids)
        completion = Sample((Message("user", "2 + 2 = "), Message("assistant", " 4")), "", kind="completion")
        row = encode(shared_tokenizer, completion)
        asked = shared_tokenizer("2 + 2 = ").input_ids
        assert row.ids == (*asked, *shared_tokenizer(" 4<|im_end|>").input_ids)
        assert labelled(shared_tokenizer, row) == " 4<|im_end|>"
        assert prompt_ids(shared_tokenizer, completion, find_template(shared_tokenizer)) == asked


class TestTemplates:
    @pytest.mark.parametrize(
        ("template", "sample", "message"),
        [
            (None, conversation("A", "B"), "the model's tokenizer has no chat template"),
            ("", conversation("A", "B"), "the model's tokenizer has no chat template"),
            (WITHOUT_END, conversation("A", "B"), "writes no end-of-turn token after the answer"),
            ("{{ raise_exception('no system here') }}", conversation("A", "B"), "refuses .*: no system here"),
            ("{% for message in %}", conversation("A", "B"), "the chat template refuses this conversation"),
            ("{{ messages[0].content + 1 }}", conversation("A", "B"), "the chat template refuses"),
            ("the same for all", conversation("A", "B"), "does not write an answer after what it asks"),
        ],
    )
    def test_a_template_that_cannot_be_used(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None, sample: Sample, message: str
    ) -> None:
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=message) as caught:
            encode(tokenizer, sample)
        assert caught.value.place == "rows.jsonl:1"

    def test_a_rewriting_template_makes_a_row_of_each_answer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.chat_template = REWRITING
        sample = conversation("A", "x</think>B", "C", "y</think>D")
        rows, summary = encode_with(tokenizer, [sample], 512)
        assert [labelled(tokenizer, row) for row in rows] == ["x</think>B<|im_end|>", "y</think>D<|im_end|>"]
        assert "x" not in tokenizer.decode(rows[1].ids)
        assert (summary.rows, summary.rewritten) == (2, 1)

    def test_a_rewriting_template_is_fine_where_it_rewrites_nothing(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        tokenizer.chat_template = REWRITING
        row = encode(tokenizer, conversation("A", "x</think>B"))
        assert labelled(tokenizer, row) == "x</think>B<|im_end|>"

    def test_the_end_of_turn_may_be_another_token_than_eos(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
        assert isinstance(tokenizer.chat_template, str)
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|eot|>")
        assert labelled(tokenizer, encode(tokenizer, conversation("A", "B"))) == "B<|eot|>"

    def test_a_slow_tokenizer_is_refused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        class Slow(type(tokenizer)):
            is_fast = False

        tokenizer.__class__ = Slow
        with pytest.raises(ModelError, match="which characters a token covers"):
            encode(tokenizer, conversation("A", "B"))
