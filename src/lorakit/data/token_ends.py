"""Which character each token ends with: asked of the tokenizer, or counted where that is exact and faster.

A byte-level tokenizer neither adds nor drops a byte, and one character of ASCII is one byte: there the lengths
of the tokens add up to their ends, and the tokenizer is spared a third of its work, which goes into alignment.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ends = tuple[list[int], list[int]]  # ids, and the ends of the same tokens


def with_ends(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ends]:
    """Ids and token ends of each text as it stands, without tokens that begin or end every text."""
    lengths = _lengths(tokenizer, len(tokenizer))
    plain = [i for i, text in enumerate(texts) if lengths and text.isascii()]
    found: list[Ends | None] = [None] * len(texts)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    quick = backend.encode_batch_fast([texts[i] for i in plain], add_special_tokens=False) if plain else []
    for i, encoding in zip(plain, quick, strict=True):
        ids = encoding.ids
        ends = list(accumulate(map(lengths.__getitem__, ids)))
        if (ends[-1] if ends else 0) == len(texts[i]):
            found[i] = (ids, ends)
    rest = [i for i, one in enumerate(found) if one is None]
    asked = backend.encode_batch([texts[i] for i in rest], add_special_tokens=False) if rest else []
    for i, encoding in zip(rest, asked, strict=True):
        found[i] = (encoding.ids, [end for _, end in encoding.offsets])
    return [one for one in found if one is not None]


@functools.lru_cache(maxsize=4)
def _lengths(tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """Bytes of each token of a byte-level tokenizer, nothing for others; ``size`` tells of added ones."""
    from tokenizers.decoders import ByteLevel

    if not isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel):
        return []
    lengths = [0] * (max(tokenizer.get_vocab().values(), default=-1) + 1)
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = len(token)  # one character stands for each byte
    for number, added in tokenizer.added_tokens_decoder.items():
        lengths[number] = len(added.content.encode())
    return lengths
