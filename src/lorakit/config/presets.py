"""Named settings: presets of keys, strengths in terms of the rank, sets of layers. Data, and nothing heavy.

The presets are those of five guides (`GUIDES`), each value with the lines it was read from. What a guide says
and lorakit does otherwise, or what was measured to be wrong, is a note at the value or among ``left_out``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.config.names import PresetName
from lorakit.config.yaml_text import scalar
from lorakit.errors import UsageError

GUIDES = {
    "S0": "parameter guide of LLaMA-Factory (Polish)",
    "S1": "article on LoRA and its relatives (Russian)",
    "S2": "guide to LoRA and QLoRA, day 48 of a course (English)",
    "S3": "notebook with a toy experiment (Polish)",
    "S4": "guide to LoRA on a MoCo vision backbone (English)",
}

# Names of one role in all architectures whose layers lorakit knows by name; a model has some of them.
_QUERY_VALUE = r"q_proj|v_proj|query|value"
_ATTENTION = rf"{_QUERY_VALUE}|k_proj|key|o_proj|out_proj|qkv_proj|c_attn|attn\.c_proj|attention\.output\.dense"
_MLP = (
    r"gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|c_fc|mlp\.c_proj|intermediate\.dense"
    r"|(?<!attention\.)output\.dense"
)
TARGET_SETS = {name: rf".*\.({names})" for name, names in
               (("qv", _QUERY_VALUE), ("attention", _ATTENTION), ("mlp", _MLP))}  # fmt: skip
"""What ``lora_target`` understands besides names and ``all``, as regular expressions of module paths."""

ALPHA_MODES = {"r": 1, "2r": 2, "4r": 4}
"""Words of ``lora_alpha`` → alpha / rank (S2:L141-146: conservative, standard, aggressive)."""


@dataclass(frozen=True)
class Choice:
    """A value of a preset, and what is to be said of it."""

    value: Any
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """Settings by a name.

    Attributes:
        name: as the key ``preset`` takes it.
        title: what it is for.
        source: guide and lines.
        choices: key → value.
        left_out: lines of the guide that lorakit does not set, and why.
    """

    name: str
    title: str
    source: str
    choices: Mapping[str, Choice]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """Key → value."""
        return {key: choice.value for key, choice in self.choices.items()}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "title": self.title, "source": self.source, "guide": GUIDES[self.source[:2]],
                "values": self.values, "notes": {key: c.note for key, c in self.choices.items() if c.note},
                "left_out": dict(self.left_out)}  # fmt: skip

    def to_yaml(self) -> str:
        """Its keys as a configuration has them, with the source of each, and what was left out."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield f"# {self.name}: {self.title}"
        yield f"# from the {GUIDES[self.source[:2]]}, {self.source}"
        wide = max(len(f"{key}: {scalar(choice.value)}") for key, choice in self.choices.items())
        for key, choice in self.choices.items():
            said = f": {choice.note}" if choice.note else ""
            yield f"{f'{key}: {scalar(choice.value)}':<{wide}}  # {self.source}{said}"
        for line, reason in self.left_out.items():
            yield f"# not set: {line} ({reason})"


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
        raise UsageError(f"there is no preset {name!r:.60}", remedy=remedy)
    return PRESETS[name]


def _make(name: PresetName, title: str, source: str, left_out: Mapping[str, str], **values: Any) -> Preset:
    choices = {key: value if isinstance(value, Choice) else Choice(value) for key, value in values.items()}
    return Preset(name, title, source, choices, left_out)


_TEMPLATE = {"template: llama3": "the model's own template, whatever the model is"}
_BY_CAPABILITY = "bf16, fp16 or fp32 by what the hardware does best"
_FP16 = {"fp16: true": f"{_BY_CAPABILITY}; float16 with 4 bits failed in a fifth of QLoRA's own runs"}
_BF16 = {"bf16: true": _BY_CAPABILITY}
_FA2 = {"flash_attn: fa2": "attention is fused and chosen for the device by itself"}
_ALL = Choice("all", "the guide's seven layers of a Llama, on any model")

_SFT = {"stage": "sft", "finetuning_type": "lora"}
_COURSE = {"num_train_epochs": 3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1}


def _alpha(value: int, mode: str = "2r") -> Choice:
    """As a multiple of the rank, so that another rank keeps the strength."""
    return Choice(mode, f"{value} in the guide")


_ALL_PRESETS = (
    _make(
        "gpu-16gb", "QLoRA of a 7B model on a GPU of 16 GB", "S0:L415-451", _TEMPLATE | _FP16,
        **_SFT, quantization_bit=4,
        lora_rank=8, lora_alpha=_alpha(16), lora_dropout=0.1,
        lora_target=Choice("attention", "q_proj,k_proj,v_proj,o_proj, or what the model calls them"),
        cutoff_len=1024, per_device_train_batch_size=1, gradient_accumulation_steps=8,
        learning_rate=1e-4, **_COURSE, gradient_checkpointing=True, logging_steps=10, save_steps=500,
    ),
    _make(
        "gpu-24gb", "LoRA of a 7B model on a GPU of 24 to 40 GB", "S0:L453-489", _TEMPLATE | _BF16 | _FA2,
        **_SFT, lora_rank=16, lora_alpha=_alpha(32), lora_dropout=0.05, lora_target=_ALL,
        cutoff_len=2048, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        learning_rate=2e-4, **_COURSE, gradient_checkpointing=True, logging_steps=10, save_steps=500,
    ),
    _make(
        "gpu-80gb", "high ranks with DoRA on a GPU of 80 GB or more", "S0:L491-528",
        _TEMPLATE | _BF16 | _FA2,
        **_SFT, lora_rank=64, lora_alpha=_alpha(128), lora_dropout=0.05, lora_target="all",
        use_rslora=Choice(True, "with it the update is scaled by 128/√64 = 16, not by 2"), use_dora=True,
        cutoff_len=4096, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-4, **_COURSE,
        gradient_checkpointing=Choice(
            True, "the guide has none, with which a 7B model takes 303 GB (`lorakit plan`), not 32"
        ),
        logging_steps=10, save_steps=200,
    ),
    _make(
        "instructions", "following instructions: a task that needs rank", "S2:L173-177", {},
        lora_rank=64, lora_alpha=_alpha(128),
        lora_target=("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    _make(
        "code", "generating code", "S2:L179-183", {},
        lora_rank=32, lora_alpha=_alpha(64), lora_target=("q_proj", "v_proj", "gate_proj", "up_proj"),
    ),
    _make(
        "summaries", "summarising", "S2:L185-189", {},
        lora_rank=16, lora_alpha=_alpha(32), lora_target=Choice("qv", "q_proj,v_proj"),
    ),
    _make(
        "vision", "linear layers of a picture model, balanced", "S4:L97-109", {},
        lora_rank=8, lora_alpha=_alpha(16), lora_target="all", learning_rate=1e-4,
        num_train_epochs=Choice(10, "the guide's default"),
    ),
    _make(
        "vision-small", "the same in little memory", "S4:L97-112", {},
        quantization_bit=4, lora_rank=Choice(4, "saves little: 4 bits do it"),
        lora_alpha=_alpha(16, "4r"), lora_target="all", learning_rate=5e-5,
        num_train_epochs=Choice(10, "the guide's default"),
    ),
    _make(
        "vision-best", "the same for quality", "S4:L114-116", {},
        lora_rank=16, lora_alpha=_alpha(32), lora_target="all", learning_rate=5e-5, num_train_epochs=20,
    ),
    _make(
        "classic", "the usual start of an article on LoRA: seven layers, rank 8", "S1:L380-407", _FP16,
        lora_rank=8, lora_alpha=_alpha(16), lora_dropout=0.1, lora_target=_ALL,
        per_device_train_batch_size=4, gradient_accumulation_steps=4,
        learning_rate=2e-4, num_train_epochs=3,
    ),
)  # fmt: skip
PRESETS = {preset.name: preset for preset in _ALL_PRESETS}
"""In the order in which they are listed."""
