"""The architectures that are known by name, so that a plan needs neither a download nor a connection.

Each entry is what that model's ``config.json`` says about shapes. The names are the usual ones without owner
and without what does not change a shape: ``meta-llama/Llama-3.1-8B-Instruct`` is ``llama-3.1-8b``. Published
totals are compared in the tests.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

# name                type         hidden layers heads kv dim inner  vocabulary tied context
_DECODERS = """
llama-7b              llama          4096   32   32  32 128 11008   32000 no    2048
llama-13b             llama          5120   40   40  40 128 13824   32000 no    2048
llama-33b             llama          6656   60   52  52 128 17920   32000 no    2048
llama-65b             llama          8192   80   64  64 128 22016   32000 no    2048
llama-2-7b            llama          4096   32   32  32 128 11008   32000 no    4096
llama-2-13b           llama          5120   40   40  40 128 13824   32000 no    4096
llama-2-70b           llama          8192   80   64   8 128 28672   32000 no    4096
llama-3-8b            llama          4096   32   32   8 128 14336  128256 no    8192
llama-3-70b           llama          8192   80   64   8 128 28672  128256 no    8192
llama-3.1-8b          llama          4096   32   32   8 128 14336  128256 no  131072
llama-3.1-70b         llama          8192   80   64   8 128 28672  128256 no  131072
llama-3.1-405b        llama         16384  126  128   8 128 53248  128256 no  131072
llama-3.2-1b          llama          2048   16   32   8  64  8192  128256 yes 131072
llama-3.2-3b          llama          3072   28   24   8 128  8192  128256 yes 131072
llama-3.3-70b         llama          8192   80   64   8 128 28672  128256 no  131072
mistral-7b-v0.1       mistral        4096   32   32   8 128 14336   32000 no   32768
mistral-7b-v0.2       mistral        4096   32   32   8 128 14336   32000 no   32768
mistral-7b-v0.3       mistral        4096   32   32   8 128 14336   32768 no   32768
smollm2-135m          llama           576   30    9   3  64  1536   49152 yes   8192
smollm2-360m          llama           960   32   15   5  64  2560   49152 yes   8192
smollm2-1.7b          llama          2048   24   32  32  64  8192   49152 yes   8192
qwen2-0.5b            qwen2           896   24   14   2  64  4864  151936 yes 131072
qwen2-1.5b            qwen2          1536   28   12   2 128  8960  151936 yes 131072
qwen2-7b              qwen2          3584   28   28   4 128 18944  152064 no  131072
qwen2-72b             qwen2          8192   80   64   8 128 29568  152064 no  131072
qwen2.5-0.5b          qwen2           896   24   14   2  64  4864  151936 yes  32768
qwen2.5-1.5b          qwen2          1536   28   12   2 128  8960  151936 yes  32768
qwen2.5-3b            qwen2          2048   36   16   2 128 11008  151936 yes  32768
qwen2.5-7b            qwen2          3584   28   28   4 128 18944  152064 no   32768
qwen2.5-14b           qwen2          5120   48   40   8 128 13824  152064 no   32768
qwen2.5-32b           qwen2          5120   64   40   8 128 27648  152064 no   32768
qwen2.5-72b           qwen2          8192   80   64   8 128 29568  152064 no   32768
qwen3-0.6b            qwen3          1024   28   16   8 128  3072  151936 yes  40960
qwen3-1.7b            qwen3          2048   28   16   8 128  6144  151936 yes  40960
qwen3-4b              qwen3          2560   36   32   8 128  9728  151936 yes  40960
qwen3-8b              qwen3          4096   36   32   8 128 12288  151936 no   40960
qwen3-14b             qwen3          5120   40   40   8 128 17408  151936 no   40960
qwen3-32b             qwen3          5120   64   64   8 128 25600  151936 no   40960
gemma-2b              gemma          2048   18    8   1 256 16384  256000 yes   8192
gemma-7b              gemma          3072   28   16  16 256 24576  256000 yes   8192
gemma-2-2b            gemma2         2304   26    8   4 256  9216  256000 yes   8192
gemma-2-9b            gemma2         3584   42   16   8 256 14336  256000 yes   8192
gemma-2-27b           gemma2         4608   46   32  16 128 36864  256000 yes   8192
gemma-3-270m          gemma3_text     640   18    4   1 256  2048  262144 yes  32768
gemma-3-1b            gemma3_text    1152   26    4   1 256  6912  262144 yes  32768
gemma-3-4b            gemma3         2560   34    8   4 256 10240  262208 yes 131072
gemma-3-12b           gemma3         3840   48   16   8 256 15360  262208 yes 131072
gemma-3-27b           gemma3         5376   62   32  16 128 21504  262208 yes 131072
phi-3-mini            phi3           3072   32   32  32  96  8192   32064 no    4096
phi-3-medium          phi3           5120   40   40  10 128 17920   32064 no    4096
phi-3.5-mini          phi3           3072   32   32  32  96  8192   32064 no  131072
phi-4                 phi3           5120   40   40  10 128 17920  100352 no   16384
phi-4-mini            phi3           3072   32   24   8 128  8192  200064 yes 131072
mixtral-8x7b          mixtral        4096   32   32   8 128 14336   32000 no   32768
mixtral-8x22b         mixtral        6144   56   48   8 128 16384   32000 no   65536
qwen1.5-moe-a2.7b     qwen2_moe      2048   24   16  16 128  5632  151936 no    8192
qwen2-57b-a14b        qwen2_moe      3584   28   28   4 128 18944  151936 no   65536
qwen3-30b-a3b         qwen3_moe      2048   48   32   4 128  6144  151936 no   40960
qwen3-235b-a22b       qwen3_moe      4096   94   64   4 128 12288  151936 no   40960
"""
_COLUMNS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size",
)  # fmt: skip
_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "mixtral-8x22b": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen1.5-moe-a2.7b": {
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen2-57b-a14b": {
        "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20480,
    },
    "qwen3-30b-a3b": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "qwen3-235b-a22b": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536},
}  # fmt: skip
_SEEING = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 896,
    "patch_size": 14,
}  # fmt: skip


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": 50257}


def _bert(hidden: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "bert", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * hidden, "vocab_size": vocabulary,
    }  # fmt: skip


def _vit(hidden: int, layers: int, heads: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * hidden,
        "patch_size": patch, "num_labels": 1000,
    }  # fmt: skip


def _dinov2(hidden: int, layers: int, heads: int, *, gated: bool = False) -> dict[str, Any]:
    return {
        "model_type": "dinov2", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "use_swiglu_ffn": gated, "image_size": 518,
    }  # fmt: skip


def _resnet(kind: str, *depths: int) -> dict[str, Any]:
    wide = 4 if kind == "bottleneck" else 1
    return {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "layer_type": kind,
        "depths": depths, "hidden_sizes": tuple(wide * width for width in (64, 128, 256, 512)),
        "num_labels": 1000,
    }  # fmt: skip


_OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "bert-base-uncased": _bert(768, 12, 12, 30522),
    "bert-base-cased": _bert(768, 12, 12, 28996),
    "bert-large-uncased": _bert(1024, 24, 16, 30522),
    "bert-large-cased": _bert(1024, 24, 16, 28996),
    "vit-base": _vit(768, 12, 12, 16),
    "vit-large": _vit(1024, 24, 16, 16),
    "vit-huge": _vit(1280, 32, 16, 14),
    "dinov2-small": _dinov2(384, 12, 6),
    "dinov2-base": _dinov2(768, 12, 12),
    "dinov2-large": _dinov2(1024, 24, 16),
    "dinov2-giant": _dinov2(1536, 40, 24, gated=True),
    "resnet-18": _resnet("basic", 2, 2, 2, 2),
    "resnet-34": _resnet("basic", 3, 4, 6, 3),
    "resnet-50": _resnet("bottleneck", 3, 4, 6, 3),
    "resnet-101": _resnet("bottleneck", 3, 4, 23, 3),
    "resnet-152": _resnet("bottleneck", 3, 8, 36, 3),
}
_ALIASES = {
    "llama-1-7b": "llama-7b", "llama-1-13b": "llama-13b", "llama-1-33b": "llama-33b",
    "llama-1-65b": "llama-65b", "llama-30b": "llama-33b", "mistral-7b": "mistral-7b-v0.3",
    "mixtral-8x7b-v0.1": "mixtral-8x7b",
    "mixtral-8x22b-v0.1": "mixtral-8x22b", "bert-base": "bert-base-uncased",
    "bert-large": "bert-large-uncased", "vit-base-patch16-224": "vit-base",
    "vit-large-patch16-224": "vit-large", "vit-huge-patch14-224": "vit-huge",
}  # fmt: skip
# Words that say how a model was trained or for what length, not how it is built.
_WORDLESS = {
    "meta", "hf", "instruct", "chat", "it", "pt", "base", "coder", "math", "4k", "8k", "128k",
    "2507", "thinking",
}  # fmt: skip


def names() -> list[str]:
    """All that is known, in the table's order."""
    return [*_rows(), *_OTHERS]


def config_of(name: str) -> dict[str, Any] | None:
    """The configuration of a known architecture; None if the name is not known."""
    for plain in _spellings(name):
        plain = _ALIASES.get(plain, plain)
        if plain in _OTHERS:
            return _OTHERS[plain]
        if plain in (rows := _rows()):
            return _decoder(plain, rows[plain])
    return None


def near(name: str) -> list[str]:
    """Known names that could have been meant."""
    return difflib.get_close_matches(_spellings(name)[-1], names(), n=3, cutoff=0.6)


def _spellings(name: str) -> tuple[str, str]:
    """The name without its owner, as it is and without the words that do not matter."""
    plain = re.sub(r"[\s_]+", "-", name.rpartition("/")[2].strip().lower())
    plain = re.sub(r"^(llama|gemma|phi)(?=[\d])", r"\1-", plain)  # llama3-8b
    return plain, "-".join(word for word in plain.split("-") if word not in _WORDLESS)


def _rows() -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in (line.split() for line in _DECODERS.strip().splitlines())}


def _decoder(name: str, row: list[str]) -> dict[str, Any]:
    kind, *numbers, tied, context = row
    config: dict[str, Any] = dict(zip(_COLUMNS, map(int, numbers), strict=True))
    config |= {"tie_word_embeddings": tied == "yes", "max_position_embeddings": int(context)}
    config |= _EXPERTS.get(name, {})
    if kind == "gemma3":
        return {"model_type": kind, "text_config": config, "vision_config": _SEEING}
    return {"model_type": kind, **config}


def known_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every name with its configuration."""
    for name in names():
        config = config_of(name)
        assert config is not None
        yield name, config
