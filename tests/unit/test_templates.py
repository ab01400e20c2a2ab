"""Named templates write what the families' own templates write, and a bad template ends in a clear error."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorakit.config.names import TemplateName, ToolFormat
from lorakit.data.encode import Row, encode_batch, prompt_ids
from lorakit.data.probe import check_template, stop_ids
from lorakit.data.rendering import Policy
from lorakit.data.sample import Message, Sample
from lorakit.data.templates import Template, find_template, kept_template, sandbox
from lorakit.data.templates.families import FAMILIES
from lorakit.data.templates.sandbox import TemplateRefusedError, render_jinja
from lorakit.data.templates.tools import TOOL_FORMATS
from lorakit.errors import DataError, UsageError
from lorakit.ops.loss import IGNORE

POLICY = Policy(cutoff_len=1 << 20)
SPECIALS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|begin_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<|end|>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end_of_text|>",
]  # fmt: skip


# Line breaks stay together whatever follows them, so that text ends in the tokens that it has when it goes on.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def chatml(default_system: str = "") -> str:
    opening = f"<|im_start|>system\n{default_system}<|im_end|>\n" if default_system else ""
    return (
        "{% if messages[0]['role'] != 'system' %}" + opening + "{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
    )


# Written down from the formats that the model cards give, with marks around what the assistant says. Turns of
# the same shape but for their words: {role}, the text, the end.
def turns(
    *, user: str, ask: str, answer: str, system: str = "", before: str = "", inside: str = "", default: str = ""
) -> str:
    """``inside`` is how a system message enters the first question, for families that have it there."""
    first = "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else DEFAULT %}"
    return (
        (first + "{{ BEFORE }}").replace("DEFAULT", repr(default)).replace("BEFORE", before or "''")
        + ("{% if s %}{{ " + system + " }}{% endif %}" if system else "")
        + "{% for m in messages %}{% set c = m['content'] %}"
        + (
            "{% if m['role'] == 'user' and s and loop.index0 == (messages[0]['role'] == 'system') | int %}"
            "{% set c = " + inside + " + c %}{% endif %}"
            if inside
            else ""
        )
        + "{% if m['role'] == 'user' %}{{ " + user + " }}"
        + "{% elif m['role'] == 'assistant' %}{{ " + ask + " }}"
        + "{% generation %}{{ " + answer.partition(" | ")[0] + " }}{% endgeneration %}"
        + ("{{ " + answer.partition(" | ")[2] + " }}" if " | " in answer else "")
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ " + ask + " }}{% endif %}"
    )  # fmt: skip


GEMMA = turns(
    before="bos_token", inside="s + '\n\n'", user="'<start_of_turn>user\n' + c + '<end_of_turn>\n'",
    ask="'<start_of_turn>model\n'", answer="c + '<end_of_turn>' | '\n'",
)  # fmt: skip
TWINS = {
    "chatml": chatml(),
    "smollm2": chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "qwen": chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3_nothink": chatml(),
    "yi": chatml(),
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "llama3": turns(
        before="bos_token", system="'<|start_header_id|>system<|end_header_id|>\n\n' + s + '<|eot_id|>'",
        user="'<|start_header_id|>user<|end_header_id|>\n\n' + c + '<|eot_id|>'",
        ask="'<|start_header_id|>assistant<|end_header_id|>\n\n'", answer="c + '<|eot_id|>'",
    ),
    "llama2": turns(
        inside="'<<SYS>>\n' + s + '\n<</SYS>>\n\n'", user="bos_token + '[INST] ' + c + ' [/INST]'",
        ask="''", answer="c + eos_token",
    ),
    "mistral": turns(
        before="bos_token", inside="s + '\n\n'", user="'[INST] ' + c + '[/INST]'", ask="''",
        answer="' ' + c + eos_token",
    ),
    "phi": turns(
        system="'<|system|>\n' + s + '<|end|>\n'", user="'<|user|>\n' + c + '<|end|>\n'",
        ask="'<|assistant|>\n'", answer="c + '<|end|>' | '\n'",
    ),
    "phi4": turns(
        system="'<|im_start|>system<|im_sep|>' + s + '<|im_end|>'",
        user="'<|im_start|>user<|im_sep|>' + c + '<|im_end|>'", ask="'<|im_start|>assistant<|im_sep|>'",
        answer="c + '<|im_end|>'",
    ),
    "zephyr": turns(
        system="'<|system|>\n' + s + eos_token", user="'<|user|>\n' + c + eos_token",
        ask="'<|assistant|>\n'", answer="c + eos_token", default="You are Zephyr, a helpful assistant.",
    ),
    "vicuna": turns(
        system="s", user="'USER: ' + c + ' '", ask="'ASSISTANT:'", answer="c + eos_token",
        default="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
    ),
    "alpaca": turns(
        system="s", user="'### Instruction:\n' + c + '\n\n'", ask="'### Response:\n'",
        answer="c + eos_token | '\n\n'",
        default="Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n",
    ),
    "deepseek": turns(
        before="bos_token", system="s + '\n\n'", user="'User: ' + c + '\n\n'", ask="'Assistant:'",
        answer="c + eos_token",
    ),
    "default": turns(
        system="'System: ' + s + eos_token + '\n'", user="'Human: ' + c + eos_token + '\n'", ask="'Assistant:'",
        answer="c + eos_token | '\n'",
    ),
    "granite3": turns(
        system="'<|start_of_role|>system<|end_of_role|>' + s + '<|end_of_text|>\n'",
        user="'<|start_of_role|>user<|end_of_role|>' + c + '<|end_of_text|>\n'",
        ask="'<|start_of_role|>assistant<|end_of_role|>'", answer="c + '<|end_of_text|>' | '\n'",
    ),
}  # fmt: skip
assert len(TWINS) >= 10


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE that knows the special tokens of all families."""
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(
        ['user\n\n  assistant\n system The quick brown fox: {"a": 1}. USER: ASSISTANT:{"a"'] * 9, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


WORDS = st.sampled_from(
    ["a", " ", "\n", "\n\n", "{", ":", "é", "😀", "👩🏽‍🚒", "字", "'", "\\", "the", "<|im_end|>", "<s>", "</s>"]
)
TEXT = st.lists(WORDS, max_size=8).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CONVERSATIONS = st.builds(
    lambda pairs, system: Sample(
        (
            *([Message("system", system)] if system else []),
            *(
                m
                for question, answer in pairs
                for m in (Message("user", question), Message("assistant", answer))
            ),
        ),
        "rows.jsonl:1",
    ),
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    st.none() | TEXT,
)
TWO_HUNDRED = settings(max_examples=200, deadline=None, derandomize=True, database=None)
FEWER = settings(TWO_HUNDRED, max_examples=50)


def plain(sample: Sample) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content} for m in sample.messages]


def encode(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, template: Template, policy: Policy = POLICY
) -> Row:
    ((row,),) = (one.rows for one in encode_batch(tokenizer, [sample], policy, template))
    return row


def loss_of(row: Row) -> list[bool]:
    return [label != IGNORE for label in row.labels]


@pytest.mark.parametrize("name", TWINS)
class TestFamilies:
    @TWO_HUNDRED
    @given(sample=CONVERSATIONS)
    def test_its_template_is_marked_as_transformers_marks_it(
        self, tokenizer: PreTrainedTokenizerBase, name: str, sample: Sample
    ) -> None:
        tokenizer.chat_template = TWINS[name]
        row = encode(tokenizer, sample, find_template(tokenizer))
        oracle = tokenizer.apply_chat_template(
            plain(sample), return_dict=True, return_assistant_tokens_mask=True
        )
        assert list(row.ids) == oracle["input_ids"]
        assert loss_of(row) == [bool(m) for m in oracle["assistant_masks"]]

    @FEWER
    @given(sample=CONVERSATIONS)
    def test_the_named_one_writes_the_same(
        self, tokenizer: PreTrainedTokenizerBase, name: str, sample: Sample
    ) -> None:
        tokenizer.chat_template = TWINS[name]
        own, named = find_template(tokenizer), find_template(tokenizer, name)
        for ask in (False, True):
            assert named.render(sample.messages, ask=ask) == own.render(sample.messages, ask=ask)
        row = encode(tokenizer, sample, named)
        # The answers are tokenised apart, so that generation asks with the very tokens of training.
        trained = loss_of(row)
        asked = prompt_ids(tokenizer, sample, named)
        assert list(row.ids[: len(asked)]) == asked
        assert trained[len(asked)] and not trained[len(asked) - 1]
        assert tokenizer.decode(row.ids) == own.render(sample.messages)

    def test_token_by_token_where_no_token_could_reach_across(
        self, tokenizer: PreTrainedTokenizerBase, name: str
    ) -> None:
        tokenizer.chat_template = TWINS[name]
        turns = (
            Message("user", "Why?"),
            Message("assistant", "a b"),
            Message("user", "a"),
            Message("assistant", "c"),
        )
        for messages in (turns, (Message("system", "S"), *turns)):
            sample = Sample(messages, "")
            assert encode(tokenizer, sample, find_template(tokenizer, name)) == encode(
                tokenizer, sample, find_template(tokenizer)
            )


# Qwen3's own way with thoughts, as its template has it.
QWEN3 = (
    (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}"
        "{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}{% set r = '' %}"
        "{% if m.reasoning_content is string %}{% set r = m.reasoning_content %}{% elif '</think>' in c %}"
        "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
        "{% if loop.index0 > ns.last and (loop.last or r) %}"
        "{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') }}"
        "{% else %}{{ c }}{% endif %}<|im_end|>\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
        "{% endif %}{% endif %}"
    )
    .replace("\n{% if loop", "{{ '\n' }}{% if loop")
    .replace("<|im_end|>\n{%", "<|im_end|>{{ '\n' }}{%")
    .replace("assistant\n{% if enable", "assistant{{ '\n' }}{% if enable")
    .replace("{{ m.role }}\n", "{{ m.role }}{{ '\n' }}")
)


class TestThoughts:
    TALK = Sample(
        (
            Message("user", "A"),
            Message("assistant", "<think>\nhm\n</think>\n\nB"),
            Message("user", "A"),
            Message("assistant", "D", thinking="so"),
        ),
        "x",
    )

    def test_qwen3_writes_what_its_own_template_writes(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.chat_template = QWEN3
        for thinking in (None, False):
            own = find_template(tokenizer, enable_thinking=thinking)
            named = find_template(tokenizer, "qwen3", enable_thinking=thinking)
            talk = (
                self.TALK
                if thinking is None
                else Sample((*self.TALK.messages[:3], Message("assistant", "D")), "x")
            )
            for end in range(1, 5):
                for ask in (False, True):
                    part = talk.messages[:end]
                    if not (thinking is False and end == 2):  # thoughts that are there are left out then
                        assert named.render(part, ask=ask) == own.render(part, ask=ask)

    def test_each_answer_is_a_row_of_its_own(self, tokenizer: PreTrainedTokenizerBase) -> None:
        (encoded,) = encode_batch(tokenizer, [self.TALK], POLICY, find_template(tokenizer, "qwen3"))
        assert encoded.rewritten
        said = [tokenizer.decode([label for label in row.labels if label != IGNORE]) for row in encoded.rows]
        assert said == [
            "<think>\nhm\n</think>\n\nB<|im_end|>",
            "<think>\nso\n</think>\n\nD<|im_end|>",
        ]
        assert "hm" not in tokenizer.decode(encoded.rows[1].ids)

    def test_without_thinking_the_empty_thought_belongs_to_the_question(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        template = find_template(tokenizer, "qwen3", enable_thinking=False)
        (encoded,) = encode_batch(tokenizer, [self.TALK], POLICY, template)
        said = [tokenizer.decode([label for label in row.labels if label != IGNORE]) for row in encoded.rows]
        assert said == ["B<|im_end|>", "D<|im_end|>"]

    def test_the_whole_history_cannot_carry_loss(self, tokenizer: PreTrainedTokenizerBase) -> None:
        policy = Policy(1 << 20, train_on_prompt=True)
        with pytest.raises(DataError, match="train_on_prompt would train on many versions"):
            encode_batch(tokenizer, [self.TALK], policy, find_template(tokenizer, "qwen3"))


WEATHER = {
    "name": "weather",
    "description": "Tells it.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Where."}},
        "required": ["city"],
    },
}
CALL = Sample(
    (
        Message("user", "Kraków?"),
        Message("assistant", "", tool_calls=({"name": "weather", "arguments": {"city": "Kraków"}},)),
        Message("tool", '{"sun": true}'),
        Message("assistant", "Sunny."),
    ),
    "x",
    tools=(WEATHER,),
)


class TestTools:
    @pytest.mark.parametrize(
        ("name", "described", "called"),
        [
            (
                "qwen",
                '<tools>\n{"type": "function", "function": {"name": "weather",',
                '<tool_call>\n{"name": "weather", "arguments": {"city": "Kraków"}}\n</tool_call><|im_end|>',
            ),
            (
                "llama3",
                '{\n    "type": "function",\n    "function": {\n        "name": "weather",',
                '{"name": "weather", "parameters": {"city": "Kraków"}}<|eot_id|>',
            ),
            (
                "mistral",
                '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather",',
                '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Kraków"}}]</s>',
            ),
            (
                "zephyr",
                "> Tool Name: weather\nTool Description: Tells it.\nTool Args:\n"
                "  - city (string, required): Where.\n\n",
                'Action: weather\nAction Input: {"city": "Kraków"}</s>',
            ),
        ],
    )
    def test_they_are_described_called_and_answered(
        self, tokenizer: PreTrainedTokenizerBase, name: str, described: str, called: str
    ) -> None:
        template = find_template(tokenizer, name)
        text = template.render(CALL.messages, tools=CALL.tools)
        assert described in text and called in text and '{"sun": true}' in text
        said = tokenizer.decode([i for i in encode(tokenizer, CALL, template).labels if i != IGNORE])
        assert called in said and "Sunny." in said and "sun" not in said

    def test_another_wording(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = find_template(tokenizer, "zephyr", tool_format="qwen")
        assert "<tool_call>" in template.render(CALL.messages, tools=CALL.tools)

    def test_a_tokenizer_with_a_template_for_tools(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.chat_template = {"default": "plain", "tool_use": "tools: {{ tools[0].function.name }}"}
        template = find_template(tokenizer, default_system="S")
        assert template.render(CALL.messages) == "plain"
        assert template.render(CALL.messages, tools=CALL.tools) == "tools: weather"


BOMBS = [
    ("{% for i in range(10**9) %}x{% endfor %}", "number that is too large"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "runs for more than"),
    ("{{ 'x' * 10**10 }}", "more than 64 million characters"),
    ("{{ [1] * 10**12 }}", "more than 64 million characters"),
    (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "million",
    ),
    (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "million",
    ),
    (
        "{% set ns = namespace(x='a' * 9999) %}{% for i in range(60) %}"
        "{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
        "million",
    ),
    ("{{ (range(99999) | list) | join('x' * 60000) }}", "million"),
    ("{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}", "million"),
    ("{{ 'x'.ljust(10**11) }}", "number that is too large"),
    ("{{ 'x' | center(10**11) }}", "number that is too large"),
    ("{{ '%0100000000000d' % 1 }}", "width that is too large"),
    ("{{ '{:100000000000}'.format('x') }}", "width that is too large"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    ("{{ 9 ** 999 }}", "power that is too high"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{% for m in %}", "Expected an expression"),
    ("{{ messages[0].content + 1 }}", "can only concatenate"),
    ("{{ raise_exception('only friends') }}", "only friends"),
]


class TestSandbox:
    @pytest.mark.parametrize(("source", "message"), BOMBS)
    def test_what_is_refused(self, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
        monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
        start = time.monotonic()
        with pytest.raises(TemplateRefusedError, match=message):
            render_jinja(source, {"messages": [{"role": "user", "content": "a"}]})
        assert time.monotonic() - start < 3

    def test_a_row_of_ten_megabytes(self) -> None:
        text = "x" * 10_000_000
        assert (
            render_jinja("{{ messages[0].content | trim + '\n' }}", {"messages": [{"content": text}]})
            == text + "\n"
        )

    def test_it_writes_what_transformers_writes(self, tokenizer: PreTrainedTokenizerBase) -> None:
        source = (
            "{%- for m in messages if m.role != 'x' %}\n    {%- if loop.first %}\n{{ bos_token }}{% endif %}\n"
            "{{ m | tojson }}{{ loop.length }}{{ m.content | tojson(indent=2) }}"
            "{% if loop.last %}{% break %}{% endif %}\n"
            "{%- endfor %}{{ 'a,b' | replace(',', ' ') }}{{ ['p', 'q'] | join('-') }}{{ '%s!' | format('f') }}"
            "{{ '{}!'.format(1) }}{{ strftime_now('%Y') }}"
        )
        tokenizer.chat_template = source
        messages = [{"role": "user", "content": 'é"<&'}, {"role": "assistant", "content": "b"}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False)
        ours = find_template(tokenizer).render((Message("user", 'é"<&'), Message("assistant", "b")))
        assert ours == expected


class TestProbe:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (chatml().replace("<|im_end|>", ""), "no end-of-turn token after the answer"),
            (
                chatml().replace(
                    "{{ m['content'] }}", "{% if m.role == 'user' %}{{ m['content'] }}{% endif %}"
                ),
                "leaves the assistant's words out",
            ),
            ("{{ bos_token }}{{ bos_token }}" + chatml(), "begins a text with <s> twice"),
            (
                chatml().replace(
                    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}", ""
                ),
                "before an answer, but not when it asks for one",
            ),
            (
                chatml().replace("<|im_start|>assistant\n{{ '' }}", "<|im_start|>assistant\n<think>\n\n\n"),
                "asks for an answer in other words than it writes before one",
            ),
            ("{{ raise_exception('never') }}", "refuses this conversation: never"),
            ("the same for all", "leaves the assistant's words out"),
        ],
    )
    def test_a_template_that_cannot_be_trained_with(
        self, tokenizer: PreTrainedTokenizerBase, source: str, message: str
    ) -> None:
        tokenizer.chat_template = source
        with pytest.raises(DataError, match=message):
            check_template(tokenizer, find_template(tokenizer))

    @pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("llama4",)])
    def test_named_templates_pass(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        token = tokenizer.convert_ids_to_tokens(check_template(tokenizer, find_template(tokenizer, name)))
        assert token in ("</s>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|end_of_text|>")

    def test_a_family_whose_tokens_the_model_lacks(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(DataError, match="no end-of-turn token"):
            check_template(tokenizer, find_template(tokenizer, "llama4"))

    def test_generation_stops_at_the_end_of_a_turn(self, tokenizer: PreTrainedTokenizerBase) -> None:
        expected = sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"]))
        assert stop_ids(tokenizer, find_template(tokenizer, "chatml")) == expected


class TestChoosing:
    def test_the_configuration_knows_the_same_names(self) -> None:
        assert get_args(TemplateName) == ("auto", *FAMILIES)
        assert get_args(ToolFormat) == tuple(TOOL_FORMATS)

    def test_names_that_are_none(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UsageError, match="there is no template called lama3"):
            find_template(tokenizer, "lama3")
        with pytest.raises(UsageError, match="there is no tool_format called gwen"):
            find_template(tokenizer, "qwen", tool_format="gwen")

    def test_a_default_system_message(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.chat_template = chatml()
        for name in ("auto", "chatml"):
            template = find_template(tokenizer, name, default_system="It's {{ me }}.\n\\")
            expected = "<|im_start|>system\nIt's {{ me }}.\n\\<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            assert template.render((Message("user", "Hi"),)) == expected
            own = template.render((Message("system", "S"), Message("user", "Hi")))
            assert own == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"

    def test_what_an_adapter_keeps_is_what_was_used(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        template = find_template(tokenizer, "vicuna", default_system="S")
        for name, text in template.files().items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        assert kept_template(tokenizer, tmp_path, template.notes()) == template
        assert kept_template(tokenizer, tmp_path / "none", {}) is None

    def test_the_real_model(self, smollm2: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        template = find_template(tokenizer)
        assert check_template(tokenizer, template) == tokenizer.convert_tokens_to_ids("<|im_end|>")
        sample = Sample((Message("user", "Hi 😀"), Message("assistant", ' {"a": 1}')), "x")
        row = encode(tokenizer, sample, template)
        assert list(row.ids) == tokenizer.apply_chat_template(plain(sample))["input_ids"]
