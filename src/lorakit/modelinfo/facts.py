"""`ModelFacts`: what a model is made of, as numbers. All that a plan needs to know of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "embedding", "norm", "conv", "experts", "other"]


@dataclass(frozen=True)
class Module:
    """A module with parameters, or the same one in many blocks.

    Attributes:
        path: where it is in the model that transformers builds; ``*`` stands for the number of the block.
        kind: ``linear`` can carry an adapter, as can ``embedding`` and ``conv``; ``experts`` are the matrices
            of a mixture of experts in one tensor, which cannot.
        shape: of the weight: linear [out, in], embedding [tokens, features], conv [out, in, height, width],
            experts [experts, out, in].
        extra: numbers beside the weight in one such module: its bias.
        blocks: the numbers that ``*`` takes; empty for a module that is there once.
        shared: the weight is another module's, and not counted again (the tied output head).
        positions: how many places of an image the convolution is computed at; 1 for everything else.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    extra: int = 0
    blocks: tuple[int, ...] = ()
    shared: bool = False
    positions: int = 1

    @property
    def count(self) -> int:
        """How often it is there."""
        return len(self.blocks) or 1

    @property
    def size(self) -> int:
        """Numbers in one weight."""
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        """Numbers in all of them, biases included; none if shared."""
        return 0 if self.shared else (self.size + self.extra) * self.count

    @property
    def matrix(self) -> tuple[int, int]:
        """The weight as a matrix [out, in], as an adapter sees it."""
        if self.kind == "embedding":
            return self.shape[1], self.shape[0]
        return self.shape[0], math.prod(self.shape[1:])

    def paths(self) -> list[str]:
        """Each one's own path."""
        return [self.path.replace("*", str(n)) for n in self.blocks] or [self.path]


@dataclass(frozen=True)
class Blocks:
    """What the blocks of a transformer compute, as far as memory and time depend on it.

    Attributes:
        layers: how many there are.
        hidden: width of the stream that they add to.
        heads: of the queries; ``kv_heads`` of keys and values, each ``head_dim`` wide.
        inner: width of the feed-forward part, of all experts that one token passes.
        gated: the feed-forward part multiplies two products (gate and up).
        norm: RMS norm, computed in float32, or layer norm.
        norms: norms in a block, without those of ``qk_norm``.
        qk_norm: queries and keys are normed.
        causal: a token sees only those before it.
        softcap: scores and logits pass a tanh (Gemma 2), which fused attention does not have.
        dropout: the model itself drops attention weights and outputs while it trains.
        active: experts that one token passes; 0 without experts.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norms: int = 2
    qk_norm: bool = False
    causal: bool = True
    softcap: bool = False
    dropout: bool = False
    active: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """A model's modules and sizes.

    Attributes:
        name: what the user called it.
        family: transformers' ``model_type``; ``matrix`` and ``unknown`` are lorakit's own.
        source: where the facts come from, in words.
        modules: everything with parameters, in the model's order.
        head: path of the layer that makes logits, which ``all`` leaves out; None if there is none.
        blocks: of a transformer; None for others, and where only the tensors are known.
        vocabulary: tokens that the head tells apart; 0 without.
        context: the longest input in tokens; of a picture model, its number of patches. None if not told.
    """

    name: str
    family: str
    source: str
    modules: tuple[Module, ...]
    head: str | None = None
    blocks: Blocks | None = None
    vocabulary: int = 0
    context: int | None = None

    @property
    def parameters(self) -> int:
        """Numbers in the whole model."""
        return sum(module.parameters for module in self.modules)

    @property
    def tied(self) -> bool:
        """The output head is the embedding."""
        return any(module.shared for module in self.modules)

    @property
    def active_parameters(self) -> int:
        """Numbers that one token meets: of a mixture of experts, only the experts that it passes."""
        return sum(module.parameters * share(module, self.blocks) // module.size for module in self.modules)


def share(module: Module, blocks: Blocks | None) -> int:
    """Numbers of one weight that one token meets."""
    if module.kind == "experts" and blocks and blocks.active:
        return module.size // module.shape[0] * blocks.active
    return module.size
