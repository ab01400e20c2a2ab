"""The optimizer, built on what is trainable (never on names).

AdamW and SGD are torch's, Adafactor is that of transformers. The 8-bit and the paged ones are those of
bitsandbytes (arXiv 2110.02861), which since 0.50 run on a CPU as well; there they round numbers below 3e-5 of
their block's largest more coarsely than on a GPU. None of them was run on a GPU yet.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lorakit.adapters.attach import adapter_layers
from lorakit.errors import UsageError
from lorakit.log import logger
from lorakit.optim.spec import BITSANDBYTES_REMEDY, OptimizerSpec


def build_optimizer(model: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The optimizer that ``spec`` describes, over all that is trainable in ``model``.

    Raises:
        UsageError: it needs a bitsandbytes that is not installed.
    """
    found = groups(model, spec.ratio)
    common: dict[str, Any] = {"lr": spec.rate, "weight_decay": spec.weight_decay}
    adam = common | {"betas": spec.betas, "eps": spec.epsilon}
    optimizer: torch.optim.Optimizer
    match spec.name:
        case "adamw_torch":
            optimizer = torch.optim.AdamW(found, **adam, fused=True)
        case "sgd":
            optimizer = torch.optim.SGD(found, **common, **spec.args)
        case "adafactor":
            from transformers.optimization import Adafactor

            # The rate is the schedule's, not relative to the weights: B starts at zero and would stay there.
            optimizer = Adafactor(found, **common, scale_parameter=False, relative_step=False)
        case name:
            bits = 8 if name.endswith("_8bit") else 32
            optimizer = _bitsandbytes(name).optim.AdamW(
                found, **adam, optim_bits=bits, is_paged=_paged(name, found)
            )
    set_rate(optimizer, spec.rate)
    return optimizer


def groups(model: nn.Module, ratio: float | None = None) -> list[dict[str, Any]]:
    """What is trainable, in groups that each say by what ``factor`` the learning rate is multiplied.

    With ``ratio`` the matrices B learn that many times faster than everything else (LoRA+, arXiv 2402.12354).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if ratio is None:
        return [{"params": trainable, "factor": 1.0}]
    layers = adapter_layers(model).values()
    faster = {id(layer.adapter(name).lora_B) for layer in layers for name in layer.adapters}
    return [
        {"params": [p for p in trainable if id(p) not in faster], "factor": 1.0},
        {"params": [p for p in trainable if id(p) in faster], "factor": ratio},
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let every group learn at ``rate`` times its own ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def _paged(name: str, found: list[dict[str, Any]]) -> bool:
    if not name.startswith("paged_"):
        return False
    on_gpu = all(p.is_cuda for group in found for p in group["params"])
    if not on_gpu:
        logger.info("optim %s: there is nothing to page on a CPU, its state stays in memory", name)
    return on_gpu


def _bitsandbytes(name: str) -> ModuleType:
    """Bitsandbytes, without what it says about other packages when it is imported."""
    chatter = logging.getLogger("bitsandbytes")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        module = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UsageError(f"optim: {name} needs bitsandbytes ({error})", remedy=BITSANDBYTES_REMEDY) from error
    finally:
        chatter.setLevel(level)
    if tuple(int(part) for part in module.__version__.split(".")[:2]) < (0, 50):
        raise UsageError(
            f"optim: {name} needs a newer bitsandbytes than {module.__version__}", remedy=BITSANDBYTES_REMEDY
        )
    return module
