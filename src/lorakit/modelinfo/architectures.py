"""From a ``config.json`` to `ModelFacts`, by its ``model_type``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorakit.errors import ModelError
from lorakit.modelinfo import encoders
from lorakit.modelinfo.decoders import FAMILIES, decoder, gpt2
from lorakit.modelinfo.facts import Blocks, ModelFacts, Module
from lorakit.modelinfo.keys import Keys

Built = tuple[list[Module], Blocks | None]
_OTHERS: dict[str, tuple[Callable[[Keys], Built], Mapping[str, Any]]] = {
    "gpt2": (gpt2, {"n_positions": 1024, "attn_pdrop": 0.1}),
    "bert": (encoders.bert, encoders.BERT_DEFAULTS),
    "vit": (encoders.vit, encoders.PICTURE_DEFAULTS),
    "dinov2": (encoders.dinov2, encoders.DINO_DEFAULTS),
    "resnet": (encoders.resnet, encoders.RESNET_DEFAULTS),
}
_HEADS = ("lm_head", "cls.predictions.decoder")


def known(config: Mapping[str, Any]) -> bool:
    """Whether `facts_of` knows this model type."""
    return str(config.get("model_type")) in (*FAMILIES, *_OTHERS, "gemma3")


def facts_of(config: Mapping[str, Any], name: str, source: str) -> ModelFacts:
    """The facts that a configuration tells.

    Args:
        config: the contents of ``config.json``.
        name: what the user called the model.
        source: where the configuration comes from; errors name it.

    Raises:
        ModelError: a model type that is not known, or keys that are missing or make no sense.
    """
    kind = str(config.get("model_type"))
    if kind == "gemma3":
        return _gemma3(config, name, source)
    if kind in FAMILIES:
        family = FAMILIES[kind]
        keys = Keys(config, family.defaults, source)
        modules, blocks = decoder(keys, family)
        return _facts(name, kind, source, (modules, blocks), keys.optional("max_position_embeddings"))
    if kind in _OTHERS:
        build, defaults = _OTHERS[kind]
        keys = Keys(config, defaults, source)
        pictures = kind in ("vit", "dinov2")
        length = (
            encoders.patches(keys) + 1 if pictures else keys.optional("max_position_embeddings", "n_positions")
        )
        return _facts(name, kind, source, build(keys), length)
    names = ", ".join(sorted((*FAMILIES, *_OTHERS)))
    raise ModelError(
        f"the architecture {kind!r:.60} is not in the table",
        place=source,
        remedy=f"name a folder with safetensors weights, whose headers tell the shapes; known are {names}",
    )


def _facts(name: str, family: str, source: str, built: Built, context: int | None) -> ModelFacts:
    modules, blocks = built
    head = next((module for module in modules if module.path in _HEADS), None)
    return ModelFacts(
        name, family, source, tuple(modules), head.path if head else None, blocks,
        head.shape[0] if head else 0, context,
    )  # fmt: skip


def _gemma3(config: Mapping[str, Any], name: str, source: str) -> ModelFacts:
    """Gemma 3 from 4 B on: a decoder, an encoder of pictures, and a matrix between them."""
    whole, family = Keys(config, {}, source), FAMILIES["gemma3_text"]
    text = Keys(whole.part("text_config"), family.defaults, source)
    seeing = Keys(whole.part("vision_config"), encoders.PICTURE_DEFAULTS, source)
    modules, blocks = decoder(text, family, root="model.language_model")
    width = seeing.number("hidden_size")
    between = [
        Module("model.multi_modal_projector.mm_input_projection_weight", "other", (width, blocks.hidden)),
        Module("model.multi_modal_projector.mm_soft_emb_norm", "norm", (width,)),
    ]
    modules = [*encoders.siglip(seeing, "model.vision_tower"), *between, *modules]
    return _facts(name, "gemma3", source, (modules, blocks), text.optional("max_position_embeddings"))
