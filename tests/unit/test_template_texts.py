"""The families without a twin in `test_templates` write, to the letter, the text that is documented for them.

The texts stand here in full, so that they share nothing with the table of the families. Marks («») enclose what
carries loss: an answer and the token that ends it. ``{system}`` is where a system message stands.
"""
# ruff: noqa: RUF001

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from test_templates import LLAMA3_WORDS, POLICY, TWINS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorakit.data.encode import encode_batch, prompt_ids
from lorakit.data.probe import check_template
from lorakit.data.sample import Message, Sample
from lorakit.data.templates import find_template
from lorakit.data.templates.families import FAMILIES
from lorakit.ops.loss import IGNORE

TALK = (
    Message("user", "Capital of Italy?"),
    Message("assistant", "Rome."),
    Message("user", "And of Peru?"),
    Message("assistant", "Lima."),
)
SYSTEM = Message("system", "Be brief.")


@dataclass(frozen=True)
class Documented:
    """How one family writes `TALK`.

    Attributes:
        rows: the text; several, one for each answer, where an answer loses its thought as the talk goes on.
        system: the system message as it is written.
        bos: the token that begins a text; None if the family's tokenizers have none.
        eos: the token that its tokenizers end a text with.
        ends: the token that ends an answer.
        tokens: its other special tokens.
    """

    rows: tuple[str, ...]
    system: str
    bos: str | None
    eos: str
    ends: str
    tokens: tuple[str, ...] = ()


CHATML = (
    "{system}<|im_start|>user\nCapital of Italy?<|im_end|>\n<|im_start|>assistant\n«Rome.<|im_end|>»\n"
    "<|im_start|>user\nAnd of Peru?<|im_end|>\n<|im_start|>assistant\n«Lima.<|im_end|>»\n"
)
CHATML_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
DOCUMENTED = {
    "cohere": Documented(
        rows=(
            "<BOS_TOKEN>{system}"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Capital of Italy?<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«Rome.<|END_OF_TURN_TOKEN|>»"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>And of Peru?<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«Lima.<|END_OF_TURN_TOKEN|>»",
        ),
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        ends="<|END_OF_TURN_TOKEN|>",
        tokens=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    ),
    "cpm3": Documented(
        rows=("<s>" + CHATML,),
        system=CHATML_SYSTEM,
        bos="<s>",
        eos="</s>",
        ends="<|im_end|>",
        tokens=("<|im_start|>",),
    ),
    "deepseek3": Documented(
        rows=(
            "<｜begin▁of▁sentence｜>{system}"
            "<｜User｜>Capital of Italy?<｜Assistant｜>«Rome.<｜end▁of▁sentence｜>»"
            "<｜User｜>And of Peru?<｜Assistant｜>«Lima.<｜end▁of▁sentence｜>»",
        ),
        system="Be brief.",
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        ends="<｜end▁of▁sentence｜>",
        tokens=("<｜User｜>", "<｜Assistant｜>"),
    ),
    "deepseekr1": Documented(
        rows=(
            "<｜begin▁of▁sentence｜>{system}<｜User｜>Capital of Italy?<｜Assistant｜>"
            "«<think>\n\n</think>\n\nRome.<｜end▁of▁sentence｜>»",
            "<｜begin▁of▁sentence｜>{system}"
            "<｜User｜>Capital of Italy?<｜Assistant｜>Rome.<｜end▁of▁sentence｜>"
            "<｜User｜>And of Peru?<｜Assistant｜>«<think>\n\n</think>\n\nLima.<｜end▁of▁sentence｜>»",
        ),
        system="Be brief.",
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        ends="<｜end▁of▁sentence｜>",
        tokens=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
    "exaone": Documented(
        rows=(
            "{system}[|user|]Capital of Italy?\n[|assistant|]«Rome.[|endofturn|]»\n"
            "[|user|]And of Peru?\n[|assistant|]«Lima.[|endofturn|]»\n",
        ),
        system="[|system|]Be brief.[|endofturn|]\n",
        bos="[BOS]",
        eos="[|endofturn|]",
        ends="[|endofturn|]",
        tokens=("[|user|]", "[|assistant|]", "[|system|]"),
    ),
    "falcon_h1": Documented(
        rows=("<|begin_of_text|>" + CHATML,),
        system=CHATML_SYSTEM,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        ends="<|im_end|>",
        tokens=("<|im_start|>",),
    ),
    "gemma2": Documented(
        rows=(
            "<bos><start_of_turn>user\n{system}Capital of Italy?<end_of_turn>\n"
            "<start_of_turn>model\n«Rome.<end_of_turn>»\n"
            "<start_of_turn>user\nAnd of Peru?<end_of_turn>\n<start_of_turn>model\n«Lima.<end_of_turn>»\n",
        ),
        system="Be brief.\n\n",
        bos="<bos>",
        eos="<eos>",
        ends="<end_of_turn>",
        tokens=("<start_of_turn>",),
    ),
    "llama4": Documented(
        rows=(
            "<|begin_of_text|>{system}<|header_start|>user<|header_end|>\n\nCapital of Italy?<|eot|>"
            "<|header_start|>assistant<|header_end|>\n\n«Rome.<|eot|>»"
            "<|header_start|>user<|header_end|>\n\nAnd of Peru?<|eot|>"
            "<|header_start|>assistant<|header_end|>\n\n«Lima.<|eot|>»",
        ),
        system="<|header_start|>system<|header_end|>\n\nBe brief.<|eot|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        ends="<|eot|>",
        tokens=("<|header_start|>", "<|header_end|>"),
    ),
    "ministral": Documented(
        rows=("<s>[INST]{system}Capital of Italy?[/INST]«Rome.</s>»[INST]And of Peru?[/INST]«Lima.</s>»",),
        system="Be brief.\n\n",
        bos="<s>",
        eos="</s>",
        ends="</s>",
        tokens=("[INST]", "[/INST]"),
    ),
    "mistral_small": Documented(
        rows=("<s>{system}[INST]Capital of Italy?[/INST]«Rome.</s>»[INST]And of Peru?[/INST]«Lima.</s>»",),
        system="[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]",
        bos="<s>",
        eos="</s>",
        ends="</s>",
        tokens=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "openchat": Documented(
        rows=(
            "<s>{system}GPT4 Correct User: Capital of Italy?<|end_of_turn|>"
            "GPT4 Correct Assistant:«Rome.<|end_of_turn|>»"
            "GPT4 Correct User: And of Peru?<|end_of_turn|>GPT4 Correct Assistant:«Lima.<|end_of_turn|>»",
        ),
        system="Be brief.",
        bos="<s>",
        eos="<|end_of_turn|>",
        ends="<|end_of_turn|>",
    ),
    "qwen3": Documented(
        rows=(
            "{system}<|im_start|>user\nCapital of Italy?<|im_end|>\n<|im_start|>assistant\n"
            "«<think>\n\n</think>\n\nRome.<|im_end|>»\n",
            "{system}<|im_start|>user\nCapital of Italy?<|im_end|>\n<|im_start|>assistant\nRome.<|im_end|>\n"
            "<|im_start|>user\nAnd of Peru?<|im_end|>\n<|im_start|>assistant\n"
            "«<think>\n\n</think>\n\nLima.<|im_end|>»\n",
        ),
        system=CHATML_SYSTEM,
        bos=None,
        eos="<|im_end|>",
        ends="<|im_end|>",
        tokens=("<|im_start|>", "<think>", "</think>"),
    ),
    "smollm": Documented(
        rows=(CHATML,), system=CHATML_SYSTEM, bos="<|im_start|>", eos="<|im_end|>", ends="<|im_end|>"
    ),
}
THOUGHTFUL = [name for name, known in DOCUMENTED.items() if "<think>" in known.tokens]
NO_THOUGHT = "<think>\n\n</think>\n\n"


def tokenizer_of(known: Documented) -> PreTrainedTokenizerBase:
    """Byte-level BPE with the family's own special tokens."""
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_only])
    bpe.decoder = decoders.ByteLevel()
    named = [known.bos, known.eos, known.ends, *known.tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(dict.fromkeys(token for token in named if token)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(["user\n\nassistant\nsystem GPT4 Correct User: Be brief. Rome. Lima."] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=known.bos, eos_token=known.eos)


def unmarked(text: str) -> str:
    return text.replace("«", "").replace("»", "")


def marked_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Ids of a marked text, and its labels: what stands between marks, and nothing else."""
    ids: list[int] = []
    labels: list[int] = []
    for number, piece in enumerate(text.replace("»", "«").split("«")):
        part = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if number % 2 else [IGNORE] * len(part)
    return ids, labels


def check(
    name: str, messages: tuple[Message, ...], rows: tuple[str, ...], *, enable_thinking: bool | None = None
) -> None:
    """The family writes those rows, asks with what stands before the last answer, and trains what is marked."""
    known = DOCUMENTED[name]
    tokenizer = tokenizer_of(known)
    template = find_template(tokenizer, name, enable_thinking=enable_thinking)
    asked = rows[-1].rpartition("«")[0]
    assert template.render(messages) == unmarked(rows[-1])
    assert template.render(messages[:-1], ask=True) == unmarked(asked)
    sample = Sample(messages, "rows.jsonl:1")
    (encoded,) = encode_batch(tokenizer, [sample], POLICY, template)
    assert len(encoded.rows) == len(rows)
    for row, text in zip(encoded.rows, rows, strict=True):
        ids, labels = marked_tokens(tokenizer, text)
        assert list(row.ids) == ids == tokenizer(unmarked(text), add_special_tokens=False)["input_ids"]
        assert list(row.labels) == labels
    assert prompt_ids(tokenizer, sample, template) == marked_tokens(tokenizer, asked)[0]


def test_every_family_is_compared_with_a_text_of_its_own() -> None:
    assert {*TWINS, *DOCUMENTED} == set(FAMILIES)


@pytest.mark.parametrize("name", DOCUMENTED)
class TestDocumentedTexts:
    def test_without_a_system_message(self, name: str) -> None:
        check(name, TALK, tuple(row.replace("{system}", "") for row in DOCUMENTED[name].rows))

    def test_with_a_system_message(self, name: str) -> None:
        known = DOCUMENTED[name]
        check(name, (SYSTEM, *TALK), tuple(row.replace("{system}", known.system) for row in known.rows))

    def test_answers_end_as_the_family_ends_them(self, name: str) -> None:
        known = DOCUMENTED[name]
        tokenizer = tokenizer_of(known)
        end = check_template(tokenizer, find_template(tokenizer, name))
        assert tokenizer.convert_ids_to_tokens(end) == known.ends


@pytest.mark.parametrize("name", THOUGHTFUL)
class TestDocumentedThoughts:
    def test_a_thought_stands_before_the_last_answer_only(self, name: str) -> None:
        thinking = (TALK[0], replace(TALK[1], thinking="Boot?"), TALK[2], replace(TALK[3], thinking="Andes?"))
        first, last = (row.replace("{system}", "") for row in DOCUMENTED[name].rows)
        thoughts = (("<think>\nBoot?\n", first), ("<think>\nAndes?\n", last))
        check(name, thinking, tuple(row.replace("<think>\n\n", thought) for thought, row in thoughts))

    def test_one_that_is_switched_off_belongs_to_the_question(self, name: str) -> None:
        rows = (
            row.replace("{system}", "").replace("«" + NO_THOUGHT, NO_THOUGHT + "«")
            for row in DOCUMENTED[name].rows
        )
        check(name, TALK, tuple(rows), enable_thinking=False)
