"""Counted token ends are the tokenizer's own, for whatever text and whatever kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorakit.data import token_ends
from lorakit.data.token_ends import with_ends

TEXT = ["The quick brown fox, 1234567890. user assistant system", "a  b\n\n  c\t", "It is seven, of course."]
PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<tool>",
    "user",
    "\n",
    "\n\n",
    " ",
    "  ",
    "Fox",
    "12",
    "é",
    "🙂",
    "e\u0301",
    "\x00",
    "\t",
]


def trained(**parts: Any) -> PreTrainedTokenizerFast:
    """A small byte-level BPE, changed part by part."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(bpe, name, part)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")


def greedy() -> PreTrainedTokenizerFast:
    """One whose special token swallows the blanks around it."""
    tokenizer = trained()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<tool>", lstrip=True, rstrip=True)]}
    )
    return tokenizer


KINDS = {
    "plain": trained,
    "greedy special token": greedy,
    "prefix space": lambda: trained(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "NFC": lambda: trained(normalizer=normalizers.NFC()),
    "lower case": lambda: trained(normalizer=normalizers.Lowercase()),
    "stripped": lambda: trained(normalizer=normalizers.Strip()),
    "metaspace": lambda: trained(pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


def asked(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    ends = [[end for _, end in offsets] for offsets in found["offset_mapping"]]
    return list(zip(found["input_ids"], ends, strict=True))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join),
        min_size=1,
        max_size=4,
    )
)
def test_ends_are_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
        return
    assert with_ends(tokenizer, texts) == asked(tokenizer, texts)


def test_the_real_one(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n  42.\n\n<|im_end|>\n",
        "",
        "naïve 🙂",
    ]
    assert with_ends(tokenizer, texts) == asked(tokenizer, texts)


def test_lengths_are_known_of_byte_level_tokenizers_only() -> None:
    tokenizer = trained()
    lengths = token_ends._lengths(tokenizer, len(tokenizer))
    assert lengths[tokenizer.convert_tokens_to_ids("<|im_start|>")] == len("<|im_start|>")
    assert not token_ends._lengths(KINDS["metaspace"](), 0)
    ids, ends = with_ends(tokenizer, ["user<|im_end|>\n"])[0]
    assert ends == [sum(lengths[i] for i in ids[: n + 1]) for n in range(len(ids))]
    assert ends[-1] == len("user<|im_end|>\n")


def test_an_added_token_is_noticed() -> None:
    tokenizer = trained()
    with_ends(tokenizer, ["a"])
    tokenizer.add_tokens(["<new token>"])
    assert with_ends(tokenizer, ["a<new token>b"]) == asked(tokenizer, ["a<new token>b"])
    assert with_ends(tokenizer, ["a<new token>b"])[0][1] == [1, 12, 13]
