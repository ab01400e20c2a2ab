"""Open a model to talk to: a base model, an adapter folder, or a run directory, by one name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit import hardware
from lorakit.adapters.attach import merge as merge_adapters
from lorakit.adapters.attach import remove_adapter
from lorakit.checkpoint import binding
from lorakit.checkpoint.peft_config import CONFIG_FILE
from lorakit.checkpoint.peft_format import NOTES_FILE, find_adapter, load_adapter
from lorakit.checkpoint.strict_json import read_object
from lorakit.config.quantization import Quantization, quantization_from
from lorakit.data.encode import prompt_ids
from lorakit.data.probe import stop_ids
from lorakit.data.sample import Message, Sample
from lorakit.data.templates import Template, find_template, kept_template
from lorakit.errors import ModelError, UsageError
from lorakit.evals.certificate import PROMPTS, certify, logits
from lorakit.evals.generate import generate
from lorakit.hardware import Precision
from lorakit.log import logger
from lorakit.models.load import check_vocabulary, load_model, load_tokenizer
from lorakit.models.quantized import quantization_of, quantized_for_now
from lorakit.models.sources import ModelSource, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kept = Literal["as trained", "none", "4", "8"]
_KEPT: dict[str, Quantization | None] = {
    "none": None,
    "4": Quantization(),
    "8": Quantization(kind="int8", double=False),
}


@dataclass(frozen=True)
class Session:
    """A loaded model, with its adapter active if there is one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    adapter: Path | None
    template: Template  # the one that the adapter was trained with, or the tokenizer's own
    notes: Mapping[str, Any]  # what lorakit wrote beside the adapter

    @property
    def system(self) -> str | None:
        """The system message that the adapter was trained with."""
        system = self.notes.get("system")
        return system if isinstance(system, str) else None

    def conversation(self, prompt: str, system: str | None = None) -> tuple[Message, ...]:
        """One question, under ``system`` or else the message that the adapter was trained with."""
        system = self.system if system is None else system
        return (*((Message("system", system),) if system else ()), Message("user", prompt))

    def probes(self) -> list[tuple[int, ...]]:
        """Token ids of a few prompts of all kinds, for comparing what models make of them."""
        asked = [Sample(self.conversation(prompt), "prompt") for prompt in PROMPTS]
        return [tuple(prompt_ids(self.tokenizer, sample, self.template)) for sample in asked]

    def answer(self, conversations: Sequence[Sequence[Message]], *, max_new_tokens: int) -> list[str]:
        """What the model says to each conversation, which ends with a question."""
        samples = [Sample(tuple(messages), "prompt") for messages in conversations]
        prompts = [prompt_ids(self.tokenizer, sample, self.template) for sample in samples]
        stop = stop_ids(self.tokenizer, self.template)
        return generate(self.model, self.tokenizer, prompts, stop=stop, max_new_tokens=max_new_tokens)


def open_session(
    name: str,
    *,
    base: str | None = None,
    precision: Precision | None = None,
    merge: bool = True,
    check_base: bool = True,
    quantization_bit: Kept = "as trained",
) -> Session:
    """Load what ``name`` means.

    Args:
        name: a run directory, an adapter folder, or a model (folder, GGUF file, hub id, demo alias).
        base: the base model, if not the one that the adapter names.
        precision: number format; the best of this machine if not given.
        merge: fold the adapter into the weights in memory, for speed; not into quantised ones.
        check_base: refuse a base model, tokenizer or chat template other than the adapter was trained with.
        quantization_bit: how the weights of the base are kept: as the adapter was trained on them, dense, or in
            4 (nf4) or 8 bits. A base that is stored quantised stays so.

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
    notes = _notes(adapter) if adapter else {}
    template = adapter and kept_template(tokenizer, adapter, _part(notes, "template"))
    if check_base:
        _check_text(notes, tokenizer, own_template=not template)
    if template:
        template.into(tokenizer)
    else:
        template = find_template(tokenizer)
    trained = _trained_on(notes, adapter) if adapter else None
    kept = trained if quantization_bit == "as trained" else _KEPT[quantization_bit]
    model = load_model(
        located,
        precision=precision or hardware.best_precision(),
        device=hardware.device(),
        quantization=kept and _for_use(kept, plain=not merge),
    )
    check_vocabulary(model, tokenizer)
    session = Session(model, tokenizer, located, adapter, template, notes)
    if adapter is not None:
        if trained and quantization_of(model) is None:
            _warn_of_dense_base(session, adapter, trained)
        load_adapter(model, adapter, check_base=check_base)
        if merge and quantization_of(model) is None:
            merge_adapters(model)
    return session


def _trained_on(notes: Mapping[str, Any], adapter: Path) -> Quantization | None:
    """How the base was kept that the adapter was trained on; None if dense, or not known."""
    recorded = notes.get("quantization")
    if recorded is None:
        return None
    try:
        return quantization_from(recorded if isinstance(recorded, dict) else {})
    except ValueError as error:
        raise ModelError(
            f"the note of how the base was quantised cannot be used: {error}",
            place=str(adapter / NOTES_FILE),
            remedy="correct it, or remove it and choose with --quantization-bit",
        ) from error


def _for_use(kept: Quantization, *, plain: bool) -> Quantization:
    """The same numbers in the precision of this session; ``plain`` if the weights themselves are worked on."""
    if plain:
        return replace(kept, compute=None, method="native", integer=False)
    missing = find_spec("bitsandbytes") is None
    return replace(kept, compute=None, method="native" if missing else kept.method)


def _warn_of_dense_base(session: Session, adapter: Path, trained: Quantization) -> None:
    """Say how much the adapter's answers change on a base that is dense, other than the one in training."""
    model, texts = session.model, session.probes()
    load_adapter(model, adapter, check_base=False)
    dense = logits(model, texts)
    remove_adapter(model, "default")
    with quantized_for_now(model, trained):
        load_adapter(model, adapter, check_base=False)
        gap = certify(logits(model, texts), dense)
        remove_adapter(model, "default")
    logger.warning(
        "warning: the adapter was trained on a base in %s; on this dense one its logits differ by %.3g on "
        "average (at most %.3g), and %.3g %% of the likeliest tokens are the same",
        trained, gap.mean_logit_difference, gap.max_logit_difference, 100 * gap.top1_agreement,
    )  # fmt: skip


def _base_of(adapter: Path) -> tuple[str, str | None]:
    raw = read_object(adapter / CONFIG_FILE)
    name, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelError(
            "the adapter does not name its base model", place=str(adapter), remedy="add --base MODEL"
        )
    return name, revision if isinstance(revision, str) else None


def _notes(adapter: Path) -> dict[str, Any]:
    """What lorakit wrote beside the adapter; an adapter from elsewhere has no such notes."""
    return read_object(adapter / NOTES_FILE) if (adapter / NOTES_FILE).exists() else {}


def _part(notes: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = notes.get(key)
    return part if isinstance(part, dict) else {}


def _check_text(notes: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, own_template: bool) -> None:
    """Refuse another vocabulary and, if the adapter does not bring its template, another chat template."""
    recorded = _part(notes, "text")
    binding.check_text({k: v for k, v in recorded.items() if own_template or k != "chat_template"}, tokenizer)
