"""Bytes by category for one device, at the highest point of training.

    weights      frozen numbers at their width; quantised layers: codes
    constants    of quantised layers. 4 bits: a float32 for each block of 64, 0.5 bit a number; quantised again
                 (``double``) 8/64 + 32/(64·256) = 0.127 bit, 0.373 less (QLoRA, arXiv 2305.14314, §3).
                 8 bits: a float32 for each row (arXiv 2208.07339)
    adapters     float32, whatever the base is; the anchors of PiSSA and OLoRA are not counted
    gradients    as wide as what trains; on a GPU with one pass an update, what they take beyond the activations
                 that they replace
    optimizer    AdamW: two moments; 8 bits: two bytes a number and a float32 for each 256 of them
    activations  see `lorakit.planning.activations`; where the backward pass of a block takes more than the
                 loss, what that block needs in between
    logits       and what the loss makes of them; 0 where a block takes more: both are never there at once
    workspace    dense copies of frozen weights: DoRA's norms, blocks of quantised ones; the gathered blocks of
                 ZeRO-3 and FSDP; buffers of gradients on their way; on a CPU, holes in the heap
    framework    the interpreter and its libraries, or a GPU's context

A frozen weight has no gradient and no moments: that is why LoRA's adapters cost so little, whatever their rank,
and why 16-bit weights decide for most models (4-bit ones, and activations, after that).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

from lorakit.errors import UsageError
from lorakit.modelinfo.facts import ModelFacts, Module
from lorakit.planning.activations import GATED, activations
from lorakit.planning.adapters import Adapted, adapted, copied, file_bytes, numbers
from lorakit.planning.setup import Setup

_FLOAT32 = 4
_BLOCK, _CONSTANTS_BLOCK = 64, 256  # numbers that share a constant, constants that share one
_EIGHT_BIT_FROM = 4096  # numbers from which bitsandbytes keeps 8-bit moments
_PIECE = 1 << 20  # numbers of a quantised weight that are dense at once (`lorakit.quant`)
_BUCKET = 64 << 20  # of gradients sent at once (`lorakit.parallel.ddp`)
# Measured (benchmarks/calibration.py): Python with torch, transformers and a tokenizer; and the holes in the
# heap. A CUDA context is as others report it.
_FRAMEWORK = {"cpu": 560_000_000, "cuda": 500_000_000}
_LOST = 6  # one part in so many of a block's places is not found again where torch makes the tensors
_LOST_BY_PASSES = 12  # and where C++ passes make most of them
_MAPPED = 32 << 20  # bytes from which glibc asks the system for each tensor alone


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. The categories are those of this module's description."""

    weights: int
    constants: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    framework: int

    @property
    def total(self) -> int:
        """At the highest point of an update."""
        return sum(self.categories().values())

    @property
    def state(self) -> int:
        """What is there between two passes, the framework left out."""
        return self.weights + self.constants + self.adapters + self.gradients + self.optimizer

    def categories(self) -> dict[str, int]:
        """By name, in order."""
        values = vars(self)
        return {field.name: values[field.name] for field in fields(self)}


@dataclass(frozen=True)
class Base:
    """Bytes of the frozen model: codes and dense numbers, and the constants of the codes."""

    weights: int
    constants: int


def memory(facts: ModelFacts, setup: Setup) -> Memory:
    """What training takes on each device.

    Raises:
        TargetError: see `lorakit.planning.adapters.adapted`.
        UsageError: the strategy needs more than one device.
    """
    if setup.strategy != "one" and setup.ranks < 2:
        raise UsageError(f"{setup.strategy} shares work among devices", remedy="give ranks: 2 or more")
    chosen = adapted(facts, setup)
    base = base_bytes(facts, setup)
    held, moved = numbers(chosen, setup)
    extra = copied(facts, setup)
    # In a second stage the copies of modules that trained whole are the model's own.
    trained = (facts.parameters if setup.trains_base else extra) + moved
    width = setup.bits // 8 if setup.method == "full" else _FLOAT32
    sizes = {
        "weights": base.weights,
        "constants": base.constants,
        "adapters": _FLOAT32 * (held + extra),
        "gradients": width * trained,
        "optimizer": optimizer_bytes(setup, _trained_shapes(facts, setup, chosen), width),
    }
    whole = dict(sizes)
    # Where all of the model trains, FSDP leaves a part of everything, as ZeRO-3 does.
    strategy = "zero3" if setup.method == "full" and setup.strategy == "fsdp" else setup.strategy
    for name in _SHARDED[strategy]:
        sizes[name] = -(-sizes[name] // setup.ranks)
    made = activations(facts, setup, chosen)
    dense = _dense(chosen, setup, facts)
    in_block = made.passing > made.logits
    passed = made.kept + max(made.passing, made.logits)
    if setup.accumulation == 1 and setup.device == "cuda":
        # Gradients take the place of activations, and are gone before the next pass.
        sizes["gradients"] = max(0, sizes["gradients"] - passed)
    if setup.offload_optimizer and setup.device == "cuda":  # so does its state, in the step alone
        sizes["optimizer"] = max(0, sizes["optimizer"] - passed)
    return Memory(
        **sizes,
        activations=made.kept + (made.passing if in_block else 0),
        logits=0 if in_block else made.logits,
        workspace=dense + _gathered(facts, setup, whole) + _holes(facts, setup, made.block + dense),
        framework=_FRAMEWORK[setup.device],
    )


# What a strategy leaves only a part of on each device. FSDP shards the base; adapters stay whole on every rank.
_SHARDED: dict[str, Sequence[str]] = {
    "one": (),
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights", "constants", "adapters"),
    "fsdp": ("weights", "constants"),
}


def base_bytes(facts: ModelFacts, setup: Setup) -> Base:
    """The frozen model: every linear layer but the output head is quantised, all else keeps its width."""
    width = setup.bits // 8 if setup.bits >= 16 else setup.width
    weights = constants = 0
    for module in facts.modules:
        if module.shared:
            continue
        if setup.bits < 16 and _quantised(module, facts, setup):
            codes, own = quantised_bytes(module, setup)
            weights += module.count * (codes + width * module.extra)
            constants += module.count * own
        else:
            weights += module.parameters * width
    return Base(weights, constants)


def quantised_bytes(module: Module, setup: Setup) -> tuple[int, int]:
    """Codes and constants of one weight, exactly as `lorakit.quant` keeps them."""
    if setup.bits == 8:
        return module.size, _FLOAT32 * module.shape[0]
    blocks = -(-module.size // _BLOCK)
    if not setup.double:
        return -(-module.size // 2), _FLOAT32 * blocks
    return -(-module.size // 2), blocks + _FLOAT32 * (-(-blocks // _CONSTANTS_BLOCK) + 1)


def optimizer_bytes(setup: Setup, shapes: Sequence[tuple[int, ...]], width: int) -> int:
    """What the optimizer remembers of tensors of these shapes."""
    if setup.optimizer == "sgd":
        return 0
    total = 0
    for shape, count in Counter(shapes).items():
        n = math.prod(shape)
        if setup.optimizer == "adafactor":
            own = _FLOAT32 * (n if len(shape) < 2 else n // shape[-1] + n // shape[-2])
        elif setup.optimizer.endswith("8bit") and n >= _EIGHT_BIT_FROM:
            own = 2 * n + 2 * _FLOAT32 * -(-n // _CONSTANTS_BLOCK)
        else:
            own = 2 * n * (_FLOAT32 if "bit" in setup.optimizer else width)
        if setup.method == "adalora":  # the sensitivity of each number and its spread
            own += 2 * _FLOAT32 * n
        total += count * own
    return total


def loading_bytes(facts: ModelFacts, setup: Setup) -> int:
    """What this process takes while a dense base is loaded on a CPU, tensor by tensor; 0 elsewhere."""
    if setup.device != "cpu" or setup.bits < 16:
        return 0
    return _FRAMEWORK["cpu"] + base_bytes(facts, setup).weights


def adapter_file(facts: ModelFacts, setup: Setup) -> int:
    """Bytes of the adapter on disk; of the whole model where that trains."""
    return facts.parameters * setup.bits // 8 if setup.method == "full" else file_bytes(facts, setup)


def _quantised(module: Module, facts: ModelFacts, setup: Setup) -> bool:
    named = any(module.path == name or module.path.endswith(f".{name}") for name in setup.dense)
    return module.kind == "linear" and module.path != facts.head and not named


def _trained_shapes(facts: ModelFacts, setup: Setup, chosen: Sequence[Adapted]) -> list[tuple[int, ...]]:
    """Of every tensor that trains."""
    shapes: list[tuple[int, ...]] = []
    if setup.trains_base:
        for module in facts.modules:
            if not module.shared:
                shapes += [module.shape] * module.count + [(module.extra,)] * (
                    module.count if module.extra else 0
                )
    for each in chosen:
        out, features = each.module.matrix
        own = [(out, each.rank)] if setup.frozen_a else [(each.rank, features), (out, each.rank)]
        more: dict[str, list[tuple[int, ...]]] = {"dora": [(out,)], "adalora": [(each.rank, 1)]}
        shapes += each.count * [*own, *more.get(setup.method, [])]
    if not setup.trains_base and (extra := copied(facts, setup)):
        shapes.append((extra,))
    return shapes


def _dense(chosen: Sequence[Adapted], setup: Setup, facts: ModelFacts) -> int:
    """Frozen weights that are dense for a moment."""
    pieces = _PIECE * setup.width if setup.bits < 16 else 0
    if setup.method != "dora":
        return pieces
    # The norm of W + s·B·A: W in float32, the update, and their sum.
    copies = 3 if setup.bits != 32 else 2
    return pieces + copies * _FLOAT32 * max(each.module.size for each in chosen)


def _holes(facts: ModelFacts, setup: Setup, block: int) -> int:
    """What a CPU's C library holds beyond what is in use: a part of what comes and goes with each block.

    glibc asks for an aligned tensor's bytes and 64 more, so that the place of one that was freed between two
    that stay does not take the next of the same size, and each block leaves places that the others do not
    find. Results of C++ passes avoid it (`lorakit.ops.buffers`). Tensors above 32 MiB do not lie in the heap.
    """
    if setup.device != "cpu" or facts.blocks is None:
        return 0
    by_passes = setup.compiled and setup.bits < 32 and setup.method != "dora" and facts.family in GATED
    narrow = setup.width * setup.tokens * facts.blocks.hidden
    lost = _LOST_BY_PASSES if by_passes else _LOST
    return facts.blocks.layers * block * min(_MAPPED, narrow) // (lost * narrow)


def _gathered(facts: ModelFacts, setup: Setup, whole: dict[str, int]) -> int:
    """Weights gathered for a block and its successor, and gradients on their way."""
    if setup.strategy == "one":
        return 0
    sent = min(_BUCKET, whole["gradients"])
    if setup.strategy not in ("zero3", "fsdp"):
        return sent
    layers = facts.blocks.layers if facts.blocks else 1
    in_blocks = sum(m.parameters for m in facts.modules if m.count == layers)
    outside = max((m.parameters for m in facts.modules if m.count != layers), default=0)
    block = max(2 * in_blocks // layers, outside)
    return sent + (whole["weights"] + whole["constants"]) * block // max(1, facts.parameters)
