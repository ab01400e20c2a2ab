"""`Setup`: the settings of a training as far as its memory and time depend on them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lorakit.config.names import OptimizerName
from lorakit.errors import UsageError
from lorakit.hardware import Device, Precision
from lorakit.modelinfo.facts import ModelFacts
from lorakit.patterns import block_numbers

if TYPE_CHECKING:
    from lorakit.config.resolve import Resolved

Method = Literal["lora", "dora", "adalora", "full"]
Strategy = Literal["one", "ddp", "zero1", "zero2", "zero3", "fsdp"]
Attention = Literal["packed", "sdpa", "eager"]
Loss = Literal["chunked", "plain"]
Pattern = tuple[tuple[str, int], ...]

BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
# Families that lorakit trains on rows laid end to end (`lorakit.models.patch.PACKABLE`).
PACKABLE = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "gpt_neox"}
)
_RANKS, _BITS = (1, 4096), (4, 8, 16, 32)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "method": get_args(Method), "bits": _BITS, "optimizer": get_args(OptimizerName),
    "strategy": get_args(Strategy),
    "attention": (None, *get_args(Attention)), "loss": get_args(Loss), "precision": tuple(BYTES),
    "device": get_args(Device),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """A training, in numbers.

    Attributes:
        method: what is trained; ``full`` is the whole model.
        rank: of the adapters.
        targets: the modules that carry one: ``("all",)``, names, or one regular expression.
        exclude: names, or one regular expression, of modules to leave out.
        layers: numbers of the blocks that carry adapters; all if None.
        rank_pattern: name or regular expression → another rank.
        whole: modules that are trained whole and saved with the adapter.
        frozen_a: A does not train (LoRA-FA).
        dropout: of the adapters' inputs.
        rslora: scale by α/√r. Without effect on memory, but not every server reads it.
        bits: of a number of the frozen base: 32, 16, 8 or 4.
        double: the constants of 4-bit blocks are quantised again.
        dense: names of layers that are not quantised, besides the head.
        precision: what activations are computed in.
        batch: sequences in one pass of one device.
        length: tokens in a sequence.
        row: tokens in a row, several of which share a packed sequence; None for one row a sequence.
        labelled: share of the tokens that carry loss.
        accumulation: passes for one update.
        checkpointing: keep the input of a block alone and compute the rest again, of each block or of the first
            of ``every`` so many; ``offload_activations``: these inputs wait in the CPU's memory (GPU only).
        optimizer: as the key ``optim``; ``offload_optimizer``: its state waits in the CPU's memory (GPU only).
        unfreezes: the base trains, too, in a second stage.
        strategy: how devices share the work; ``ranks`` of them.
        device: where it runs.
        attention: ``packed``, ``sdpa`` (fused, padded), or ``eager`` (plain products); None for what lorakit
            does with this family.
        loss: ``chunked``, or ``plain`` cross-entropy on float32 logits of all positions.
        passes: lorakit's C++ passes compute, on a CPU; without a compiler they do not (`lorakit env`).
        units: the CPU has matrix units, by which the passes multiply.
    """

    method: Method = "lora"
    rank: int = 8
    targets: tuple[str, ...] = ("all",)
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Pattern = ()
    whole: tuple[str, ...] = ()
    frozen_a: bool = False
    dropout: float = 0.0
    rslora: bool = False
    bits: int = 16
    double: bool = True
    dense: tuple[str, ...] = ()
    precision: Precision = "bf16"
    batch: int = 1
    length: int = 2048
    row: int | None = None
    labelled: float = 1.0
    accumulation: int = 8
    checkpointing: bool = False
    every: int = 1
    offload_activations: bool = False
    optimizer: str = "adamw_torch"
    offload_optimizer: bool = False
    unfreezes: bool = False
    strategy: Strategy = "one"
    ranks: int = 1
    device: Device = "cpu"
    attention: Attention | None = None
    loss: Loss = "chunked"
    passes: bool = True
    units: bool = False

    def __post_init__(self) -> None:
        _between("rank", self.rank, *_RANKS)
        for name in ("batch", "length", "accumulation", "every"):
            _between(name, vars(self)[name], 1, 10**9)
        _between("ranks", self.ranks, 1, 10**6)
        if self.row is not None:
            _between("row", self.row, 1, self.length)
        for name, allowed in _CHOICES.items():
            if (value := vars(self)[name]) not in allowed:
                raise UsageError(
                    f"{name} cannot be {value!r:.60}", remedy=f"choose {', '.join(map(str, allowed))}"
                )
        for name, share in (("dropout", self.dropout), ("labelled", self.labelled)):
            if not (isinstance(share, int | float) and math.isfinite(share) and 0 <= share <= 1):
                raise UsageError(f"{name} must be between 0 and 1, not {share!r:.60}")
        if self.trains_base and self.bits < 16:
            raise UsageError("a quantised base cannot be trained whole", remedy="choose 16 or 32 bits, or lora")
        # A dense base computes in its own number format.
        if self.bits == 32:
            object.__setattr__(self, "precision", "fp32")
        elif self.bits == 16 and self.precision == "fp32":
            object.__setattr__(self, "precision", "bf16")

    @property
    def trains_base(self) -> bool:
        """All of the model trains, at some time of the run at least."""
        return self.method == "full" or self.unfreezes

    @property
    def width(self) -> int:
        """Bytes of a number in activations."""
        return BYTES[self.precision]

    @property
    def compiled(self) -> bool:
        """C++ passes compute what they can."""
        return self.passes and self.device == "cpu" and self.precision != "fp16"

    @property
    def tokens(self) -> int:
        """In one pass of one device."""
        return self.batch * self.length

    @property
    def effective_batch(self) -> int:
        """Sequences in one update of all devices (per device × accumulation × devices)."""
        return self.batch * self.accumulation * self.ranks

    def attention_of(self, facts: ModelFacts) -> Attention:
        """The attention that is asked for, or that lorakit chooses for this family."""
        packs = facts.family in PACKABLE
        if self.attention is None and facts.blocks and facts.blocks.softcap and not packs:
            return "eager"
        return self.attention or ("packed" if packs else "sdpa")

    def in_shared_passes(self, facts: ModelFacts, tokens: int | None = None) -> Setup:
        """The same updates with rows that share passes of ``tokens``; left out, of `PASS_TOKENS` on a CPU."""
        from lorakit.config.resolve import PASS_TOKENS  # there already, with the configuration that said so

        tokens = (PASS_TOKENS if self.device == "cpu" else 0) if tokens is None else tokens
        if not tokens or facts.family not in PACKABLE:
            return self
        rows = self.batch * self.accumulation
        batch = min(rows, max(1, tokens // self.length))
        return replace(self, batch=batch, accumulation=-(-rows // batch))


def setup_of(settings: Resolved) -> Setup:
    """The setup that a configuration describes, for one process.

    Raises:
        UsageError: the DeepSpeed file cannot be read, or names no stage.
    """
    method: Method = "adalora" if settings.use_adalora else "dora" if settings.use_dora else "lora"
    quantization = settings.quantization
    length, batch = settings.cutoff_len, settings.per_device_train_batch_size
    if settings.max_tokens_per_batch is not None:
        length = min(length, settings.max_tokens_per_batch)
        batch = max(1, settings.max_tokens_per_batch // length)
    offloads = settings.offload_optimizer or _zero(settings.deepspeed)[1]
    return Setup(
        method=method,
        rank=settings.lora_rank,
        targets=_tuple(settings.lora_target),
        exclude=settings.exclude_modules or (),
        layers=_numbers(settings.layers_to_transform),
        rank_pattern=tuple((settings.rank_pattern or {}).items()),
        whole=settings.additional_target or (),
        frozen_a=settings.lora_fa,
        dropout=settings.lora_dropout,
        rslora=settings.use_rslora,
        bits=quantization.bits if quantization else 8 * BYTES[settings.precision],
        double=quantization.double if quantization else True,
        dense=quantization.skip if quantization else (),
        precision=settings.precision,
        batch=batch,
        length=length,
        accumulation=settings.gradient_accumulation_steps,
        checkpointing=settings.gradient_checkpointing,
        every=settings.gradient_checkpointing_every,
        offload_activations=settings.offload_activations,
        optimizer=settings.optim,
        offload_optimizer=offloads,
        unfreezes=settings.unfreeze_after is not None,
    )


def strategy_of(settings: Resolved) -> Strategy:
    """How several processes would share the work of this run; raises as `setup_of` does."""
    return "fsdp" if settings.fsdp else _zero(settings.deepspeed)[0]


def _zero(deepspeed: str | Mapping[str, Any] | None) -> tuple[Strategy, bool]:
    """Of a DeepSpeed file, or its content: the strategy, and whether the optimizer's state waits on the CPU."""
    if deepspeed is None:
        return "ddp", False
    stages: dict[Any, Strategy] = {1: "zero1", 2: "zero2", 3: "zero3"}
    try:
        found = json.loads(Path(deepspeed).read_bytes()) if isinstance(deepspeed, str) else deepspeed
        zero = found["zero_optimization"]
        return stages[zero["stage"]], (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        place = deepspeed if isinstance(deepspeed, str) else None
        raise UsageError(
            f"deepspeed: cannot read zero_optimization.stage: {error}", place=place, remedy="give 1, 2 or 3"
        ) from error


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _numbers(layers: Sequence[int] | str | None) -> tuple[int, ...] | None:
    return None if layers is None else block_numbers(layers)


def _between(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{name} must be a whole number between {least} and {most}, not {value!r:.60}")
