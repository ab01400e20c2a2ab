"""lorakit: fine-tune with LoRA from one YAML file, and see the proof that it worked.

The public names load on first use, so that ``import lorakit`` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.adapters.attach import add_lora_to_model, count_parameters, freeze_backbone_params
    from lorakit.adapters.spec import LoRAConfig
    from lorakit.checkpoint.manager import LoRAManager
    from lorakit.evals.batch_size import find_optimal_batch_size
    from lorakit.monitor import monitor_memory
    from lorakit.planning.plan import plan
    from lorakit.standalone import LinearWithLoRA, LoRALayer
    from lorakit.training.recipe import train

__version__ = "0.1.0"

__all__ = [
    "LinearWithLoRA",
    "LoRAConfig",
    "LoRALayer",
    "LoRAManager",
    "__version__",
    "add_lora_to_model",
    "count_parameters",
    "find_optimal_batch_size",
    "freeze_backbone_params",
    "monitor_memory",
    "plan",
    "train",
]

_MODULES = {
    "LinearWithLoRA": "lorakit.standalone",
    "LoRAConfig": "lorakit.adapters.spec",
    "LoRALayer": "lorakit.standalone",
    "LoRAManager": "lorakit.checkpoint.manager",
    "add_lora_to_model": "lorakit.adapters.attach",
    "count_parameters": "lorakit.adapters.attach",
    "find_optimal_batch_size": "lorakit.evals.batch_size",
    "freeze_backbone_params": "lorakit.adapters.attach",
    "monitor_memory": "lorakit.monitor",
    "plan": "lorakit.planning.plan",
    "train": "lorakit.training.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    value = vars(importlib.import_module(_MODULES[name]))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
