"""What is asked after a training: is the rank more than was needed, and what does the model no longer know.

The rank probe reads the singular values of the updates. The forgetting probe measures the perplexity of the
base and of the adapter on a text that has nothing to do with the task.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit.adapters.attach import activate, carriers
from lorakit.checkpoint.inspect import UpdateFacts, energy_rank
from lorakit.data.encode import Row, encode_all
from lorakit.data.rendering import Policy
from lorakit.data.sample import Message, Sample
from lorakit.data.templates import Template
from lorakit.errors import DataError, UsageError
from lorakit.evals.evaluate import mean_loss
from lorakit.evals.metrics import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PYTHON_TEXT = "python"  # names two chapters of the language reference, which every Python brings
_CHAPTERS = ("objects", "execmodel")
_WINDOW = 512  # tokens that see each other


@dataclass(frozen=True)
class RankProbe:
    """How much of its ranks an adapter uses.

    Attributes:
        modules: updates looked at; ``dead`` of them are zero.
        r: the largest rank as stored: an adapter with an anchored start (PiSSA, OLoRA) has twice its own there.
        effective: mean over the modules of exp(entropy of the singular values).
        rank_99: the smallest rank that keeps 99 % of Σσᵢ² over all modules, if each is cut to it.
        recommended: the same for 90 %. The last tenth is mostly noise of the training: cutting a demo adapter
            from rank 8 to 4 took its held-out loss from 0.076 to 0.079. `lorakit compress` measures it.
    """

    modules: int
    dead: int
    r: int
    effective: float
    rank_99: int
    recommended: int


@dataclass(frozen=True)
class NeutralText:
    """A text as rows of at most 512 tokens, all of which carry loss; ``sha256`` is that of the text."""

    name: str
    sha256: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Forgetting:
    """Perplexity of the base and of the adapter on a neutral text, and how many tokens were predicted."""

    text: str
    sha256: str
    tokens: int
    base: float
    adapter: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values; None stands for infinity."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}


def probe_ranks(updates: Sequence[UpdateFacts]) -> RankProbe | None:
    """What the updates of an `Inspection` say about the rank; None if there are none."""
    if not updates:
        return None
    r = max(update.r for update in updates)
    together = [
        sum(u.spectrum[i] ** 2 for u in updates if i < len(u.spectrum)) ** 0.5  # of the i-th ranks of all
        for i in range(r)
    ]
    return RankProbe(
        modules=len(updates),
        dead=sum(update.norm == 0 for update in updates),
        r=r,
        effective=sum(update.effective_rank for update in updates) / len(updates),
        rank_99=energy_rank(together, 0.99),
        recommended=energy_rank(together, 0.9),
    )


def neutral_text(name: str, tokenizer: PreTrainedTokenizerBase, template: Template) -> NeutralText:
    """The text file ``name``, or Python's own for ``python``, as rows.

    Python's is prose about the language, some 14 kB, and differs a little between its versions; such a measure
    says what changed, not how good a model is.

    Raises:
        DataError: the file cannot be read or holds no text.
        UsageError: this Python comes without its documentation.
    """
    text = _python_text() if name == PYTHON_TEXT else _file_text(Path(name))
    if not text.strip():
        raise DataError("the text is empty", place=name, remedy="choose a file of a few kB of prose")
    sample = Sample((Message("assistant", text),), name, kind="text")
    rows, _ = encode_all(tokenizer, [sample], Policy(_WINDOW, long_rows="split"), template)
    return NeutralText(Path(name).name, hashlib.sha256(text.encode()).hexdigest(), rows)


def probe_forgetting(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: NeutralText,
    *,
    batch_size: int,
    poll: Callable[[], None] = lambda: None,
) -> Forgetting:
    """Measure the base alone and with its active adapters, which are active again afterwards.

    ``poll`` is called after each batch, and what it raises ends the probe.
    """
    with base_alone(model):
        base = mean_loss(model, tokenizer, text.rows, batch_size, poll)
    adapted = mean_loss(model, tokenizer, text.rows, batch_size, poll)
    tokens = sum(row.supervised for row in text.rows)
    return Forgetting(text.name, text.sha256, tokens, perplexity(base), perplexity(adapted))


@contextlib.contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Within the block no adapter is active."""
    names = next(iter(carriers(model).values())).route.names
    activate(model)
    try:
        yield
    finally:
        activate(model, *names)


def _python_text() -> str:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[chapter] for chapter in _CHAPTERS)
    except (ImportError, KeyError) as error:
        raise UsageError(
            "this Python comes without its documentation", remedy="name a text file instead of `python`"
        ) from error


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"cannot read the text: {reason}", place=str(path)) from error
