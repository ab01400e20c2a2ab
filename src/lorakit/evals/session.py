"""Open a model to talk to: a base model, an adapter folder, or a run directory, by one name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import hardware
from lorakit.checkpoint.manager import LoRAManager
from lorakit.checkpoint.peft_config import CONFIG_FILE, read_peft
from lorakit.checkpoint.peft_format import NOTES_FILE, load_adapter
from lorakit.data.sample import Message
from lorakit.errors import ModelError, UsageError
from lorakit.hardware import Precision
from lorakit.models.load import check_vocabulary, load_model, load_tokenizer
from lorakit.models.sources import ModelSource, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Session:
    """A loaded model, with its adapter active if there is one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    adapter: Path | None
    system: str | None  # the system message that the adapter was trained with

    def conversation(self, prompt: str, system: str | None = None) -> tuple[Message, ...]:
        """One question, under ``system`` or else the message that the adapter was trained with."""
        system = self.system if system is None else system
        return (*((Message("system", system),) if system else ()), Message("user", prompt))


def open_session(
    name: str, *, base: str | None = None, precision: Precision | None = None, merge: bool = True
) -> Session:
    """Load what ``name`` means.

    Args:
        name: a run directory, an adapter folder, or a model (folder, GGUF file, hub id, demo alias).
        base: the base model, if not the one that the adapter names.
        precision: number format; the best of this machine if not given.
        merge: fold the adapter into the weights in memory, for speed.

    Raises:
        UsageError: ``base`` is given, but ``name`` is no adapter.
        ModelError: the model or the adapter cannot be used.
    """
    adapter = find_adapter(Path(name))
    if adapter is None and base is not None:
        raise UsageError(
            f"{name} is no adapter, so there is no base model to choose", remedy="leave --base out"
        )
    if adapter is None or base is not None:
        source, revision = base or name, None
    else:
        source, revision = _base_of(adapter)
    located = locate(source, revision)
    tokenizer = load_tokenizer(located)
    model = load_model(located, precision=precision or hardware.best_precision(), device=hardware.device())
    check_vocabulary(model, tokenizer)
    if adapter is not None:
        load_adapter(model, adapter)
        if merge:
            LoRAManager(model).merge_lora_weights()
    return Session(model, tokenizer, located, adapter, _system(adapter) if adapter else None)


def find_adapter(path: Path) -> Path | None:
    """The adapter folder that ``path`` is or, being a run directory, holds; None if it is neither."""
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    return None


def _base_of(adapter: Path) -> tuple[str, str | None]:
    _, raw = read_peft(adapter)
    name, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelError(
            "the adapter does not name its base model", place=str(adapter), remedy="add --base MODEL"
        )
    return name, revision if isinstance(revision, str) else None


def _system(adapter: Path) -> str | None:
    try:
        system = json.loads((adapter / NOTES_FILE).read_text(encoding="utf-8")).get("system")
    except (OSError, ValueError, AttributeError):
        return None  # an adapter from elsewhere has no such notes
    return system if isinstance(system, str) else None
