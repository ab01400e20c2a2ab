"""Names that values are chosen from, for parts of the program that lie above the configuration."""

from __future__ import annotations

from typing import Literal

TemplateName = Literal[
    "auto",
    "alpaca",
    "chatml",
    "cohere",
    "cpm3",
    "deepseek",
    "deepseek3",
    "deepseekr1",
    "default",
    "exaone",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3",
    "granite3",
    "llama2",
    "llama3",
    "llama4",
    "ministral",
    "mistral",
    "mistral_small",
    "openchat",
    "phi",
    "phi4",
    "qwen",
    "qwen3",
    "qwen3_nothink",
    "smollm",
    "smollm2",
    "vicuna",
    "yi",
    "zephyr",
]
ToolFormat = Literal["default", "llama3", "mistral", "qwen"]
LongRows = Literal["truncate", "drop", "split"]

ScheduleName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]

OptimizerName = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_hf",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "sgd",
]

PresetName = Literal[
    "gpu-16gb",
    "gpu-24gb",
    "gpu-80gb",
    "instructions",
    "code",
    "summaries",
    "vision",
    "vision-small",
    "vision-best",
    "classic",
]
AlphaMode = Literal["r", "2r", "4r"]
