"""What is asked after a training: what does the model no longer know.

Measured is the perplexity of the base and of the adapter on a text that has nothing to do with the task.
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
