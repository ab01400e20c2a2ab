"""Models that look at all of their input at once: BERT, ViT, DINOv2, SigLIP (in Gemma 3), and ResNet.

As `decoders`: from the keys of ``config.json`` to modules, by the names and shapes of transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorakit.modelinfo.decoders import modules_at
from lorakit.modelinfo.facts import Blocks, Module
from lorakit.modelinfo.keys import Keys

BERT_DEFAULTS = {
    "type_vocab_size": 2, "max_position_embeddings": 512, "num_labels": 2, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
PICTURE_DEFAULTS = {"num_channels": 3, "image_size": 224, "patch_size": 16, "num_labels": 2}
DINO_DEFAULTS = {**PICTURE_DEFAULTS, "mlp_ratio": 4, "patch_size": 14}
RESNET_DEFAULTS = {
    "num_channels": 3, "embedding_size": 64, "hidden_sizes": (256, 512, 1024, 2048), "depths": (3, 4, 6, 3),
    "layer_type": "bottleneck", "num_labels": 2, "image_size": 224,
}  # fmt: skip
Built = tuple[list[Module], Blocks | None]


def bert(keys: Keys) -> Built:
    """BERT: bare, with the head of its pre-training, or with one for classes."""
    hidden, inner, vocabulary = (
        keys.number("hidden_size"), keys.number("intermediate_size"), keys.number("vocab_size"),
    )  # fmt: skip
    layers, heads = keys.number("num_hidden_layers"), keys.number("num_attention_heads")
    architecture = keys.architecture()
    masked = architecture in ("BertForMaskedLM", "BertForPreTraining")
    root = "" if architecture in ("", "BertModel") else "bert."
    places, kinds = keys.number("max_position_embeddings"), keys.number("type_vocab_size")
    modules = [
        Module(f"{root}embeddings.word_embeddings", "embedding", (vocabulary, hidden)),
        Module(f"{root}embeddings.position_embeddings", "embedding", (places, hidden)),
        Module(f"{root}embeddings.token_type_embeddings", "embedding", (kinds, hidden)),
        Module(f"{root}embeddings.LayerNorm", "norm", (hidden,), hidden),
        *modules_at(
            f"{root}encoder.layer.*", tuple(range(layers)),
            ("attention.self.query", "linear", (hidden, hidden), hidden),
            ("attention.self.key", "linear", (hidden, hidden), hidden),
            ("attention.self.value", "linear", (hidden, hidden), hidden),
            ("attention.output.dense", "linear", (hidden, hidden), hidden),
            ("attention.output.LayerNorm", "norm", (hidden,), hidden),
            ("intermediate.dense", "linear", (inner, hidden), inner),
            ("output.dense", "linear", (hidden, inner), hidden),
            ("output.LayerNorm", "norm", (hidden,), hidden),
        ),
    ]  # fmt: skip
    if architecture != "BertForMaskedLM":
        modules.append(Module(f"{root}pooler.dense", "linear", (hidden, hidden), hidden))
    if masked:
        modules += [
            Module("cls.predictions.transform.dense", "linear", (hidden, hidden), hidden),
            Module("cls.predictions.transform.LayerNorm", "norm", (hidden,), hidden),
            Module("cls.predictions.decoder", "linear", (vocabulary, hidden), shared=True),
            Module("cls.predictions.bias", "other", (vocabulary,)),
        ]
    if architecture == "BertForPreTraining":
        modules.append(Module("cls.seq_relationship", "linear", (2, hidden), 2))
    modules += _classifier(keys, architecture, "BertForSequenceClassification", hidden)
    return modules, _encoder(keys, (layers, hidden, heads, inner))


def vit(keys: Keys) -> Built:
    """ViT, bare or with a classifier."""
    hidden, inner = keys.number("hidden_size"), keys.number("intermediate_size")
    layers, heads = keys.number("num_hidden_layers"), keys.number("num_attention_heads")
    architecture = keys.architecture()
    root = "" if architecture in ("", "ViTModel") else "vit."
    modules = [
        Module(f"{root}embeddings.cls_token", "other", (1, hidden)),
        Module(f"{root}embeddings.position_embeddings", "other", (patches(keys) + 1, hidden)),
        _stem(keys, f"{root}embeddings.patch_embeddings.projection", hidden),
        *modules_at(
            f"{root}layers.*", tuple(range(layers)),
            ("attention.q_proj", "linear", (hidden, hidden), hidden),
            ("attention.k_proj", "linear", (hidden, hidden), hidden),
            ("attention.v_proj", "linear", (hidden, hidden), hidden),
            ("attention.o_proj", "linear", (hidden, hidden), hidden),
            ("layernorm_before", "norm", (hidden,), hidden),
            ("layernorm_after", "norm", (hidden,), hidden),
            ("mlp.fc1", "linear", (inner, hidden), inner),
            ("mlp.fc2", "linear", (hidden, inner), hidden),
        ),
        Module(f"{root}layernorm", "norm", (hidden,), hidden),
    ]  # fmt: skip
    if not root:
        modules.append(Module("pooler.dense", "linear", (hidden, hidden), hidden))
    modules += _classifier(keys, architecture, "ViTForImageClassification", hidden)
    return modules, _encoder(keys, (layers, hidden, heads, inner))


def dinov2(keys: Keys) -> Built:
    """DINOv2; its largest size has a gated feed-forward part."""
    hidden, gated = keys.number("hidden_size"), keys.flag("use_swiglu_ffn")
    layers, heads = keys.number("num_hidden_layers"), keys.number("num_attention_heads")
    inner = hidden * keys.number("mlp_ratio")
    if gated:
        inner = (inner * 2 // 3 + 7) // 8 * 8
    names = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
    widths = [(inner, hidden)] * (len(names) - 1) + [(hidden, inner)]
    architecture = keys.architecture()
    root = "" if architecture in ("", "Dinov2Model") else "dinov2."
    modules = [
        Module(f"{root}embeddings.cls_token", "other", (1, hidden)),
        Module(f"{root}embeddings.mask_token", "other", (1, hidden)),
        Module(f"{root}embeddings.position_embeddings", "other", (patches(keys) + 1, hidden)),
        _stem(keys, f"{root}embeddings.patch_embeddings.projection", hidden),
        *modules_at(
            f"{root}encoder.layer.*", tuple(range(layers)),
            ("norm1", "norm", (hidden,), hidden),
            ("attention.q_proj", "linear", (hidden, hidden), hidden),
            ("attention.k_proj", "linear", (hidden, hidden), hidden),
            ("attention.v_proj", "linear", (hidden, hidden), hidden),
            ("attention.o_proj", "linear", (hidden, hidden), hidden),
            ("layer_scale1.lambda1", "other", (hidden,), 0),
            ("norm2", "norm", (hidden,), hidden),
            *((f"mlp.{name}", "linear", width, width[0]) for name, width in zip(names, widths, strict=True)),
            ("layer_scale2.lambda1", "other", (hidden,), 0),
        ),
        Module(f"{root}layernorm", "norm", (hidden,), hidden),
    ]  # fmt: skip
    modules += _classifier(keys, architecture, "Dinov2ForImageClassification", 2 * hidden)
    return modules, _encoder(keys, (layers, hidden, heads, inner), gated=gated)


def siglip(keys: Keys, root: str) -> list[Module]:
    """The part of Gemma 3 that sees, without SigLIP's own head."""
    hidden, inner = keys.number("hidden_size"), keys.number("intermediate_size")
    every = tuple(range(keys.number("num_hidden_layers")))
    return [
        _stem(keys, f"{root}.embeddings.patch_embedding", hidden),
        Module(f"{root}.embeddings.position_embedding", "embedding", (patches(keys), hidden)),
        *modules_at(
            f"{root}.encoder.layers.*", every,
            ("layer_norm1", "norm", (hidden,), hidden),
            ("self_attn.k_proj", "linear", (hidden, hidden), hidden),
            ("self_attn.v_proj", "linear", (hidden, hidden), hidden),
            ("self_attn.q_proj", "linear", (hidden, hidden), hidden),
            ("self_attn.out_proj", "linear", (hidden, hidden), hidden),
            ("layer_norm2", "norm", (hidden,), hidden),
            ("mlp.fc1", "linear", (inner, hidden), inner),
            ("mlp.fc2", "linear", (hidden, inner), hidden),
        ),
        Module(f"{root}.post_layernorm", "norm", (hidden,), hidden),
    ]  # fmt: skip


def resnet(keys: Keys) -> Built:
    """ResNet. Each convolution knows at how many places of an image it is computed."""
    sizes, depths, width = keys.numbers("hidden_sizes"), keys.numbers("depths"), keys.number("embedding_size")
    basic = keys.text("layer_type") == "basic"
    architecture = keys.architecture()
    root = "" if architecture in ("", "ResNetModel") else "resnet."
    side = -(-keys.number("image_size") // 2)
    modules = [*_convolution(f"{root}embedder.embedder", (width, keys.number("num_channels"), 7), side)]
    side = -(-side // 2)  # the pooling after it
    for stage, (out, depth) in enumerate(zip(sizes, depths, strict=True)):
        for layer in range(depth):
            strided = layer == 0 and stage > 0
            before, side = side, -(-side // 2) if strided else side
            path = f"{root}encoder.stages.{stage}.layers.{layer}"
            if width != out or strided:
                modules += _convolution(f"{path}.shortcut", (out, width, 1), side)
            # A bottleneck narrows first, and strides in its second convolution.
            narrow = out // 4
            steps = [(out, width, 3, side), (out, out, 3, side)] if basic else [
                (narrow, width, 1, before), (narrow, narrow, 3, side), (out, narrow, 1, side),
            ]  # fmt: skip
            for number, (to, of, kernel, at) in enumerate(steps):
                modules += _convolution(f"{path}.layer.{number}", (to, of, kernel), at)
            width = out
    if architecture == "ResNetForImageClassification":
        labels = _labels(keys)
        modules.append(Module("classifier.1", "linear", (labels, width), labels))
    return modules, None


def patches(keys: Keys) -> int:
    """Into how many patches an image is cut."""
    return (keys.number("image_size") // keys.number("patch_size")) ** 2


def _convolution(path: str, shape: tuple[int, int, int], side: int) -> Iterator[Module]:
    """A convolution without bias and the norm after it."""
    out, features, kernel = shape
    yield Module(f"{path}.convolution", "conv", (out, features, kernel, kernel), positions=side * side)
    yield Module(f"{path}.normalization", "norm", (out,), out)


def _stem(keys: Keys, path: str, hidden: int) -> Module:
    """The convolution that makes a vector of each patch."""
    patch = keys.number("patch_size")
    shape = (hidden, keys.number("num_channels"), patch, patch)
    return Module(path, "conv", shape, hidden, positions=patches(keys))


def _classifier(keys: Keys, architecture: str, wanted: str, width: int) -> list[Module]:
    labels = _labels(keys)
    return [Module("classifier", "linear", (labels, width), labels)] if architecture == wanted else []


def _labels(keys: Keys) -> int:
    return len(keys.part("id2label")) or keys.number("num_labels")


def _encoder(keys: Keys, sizes: tuple[int, int, int, int], *, gated: bool = False) -> Blocks:
    layers, hidden, heads, inner = sizes
    drops = keys.share("attention_probs_dropout_prob") > 0
    return Blocks(
        layers, hidden, heads, heads, hidden // heads, inner,
        gated=gated, norm="layer", causal=False, dropout=drops,
    )  # fmt: skip
