"""Methods: what is trained. Each is one file with one row in `METHODS`."""

from __future__ import annotations

from lorakit.adapters.methods.adalora import AdaLoRA
from lorakit.adapters.methods.dora import DoRA
from lorakit.adapters.methods.lora import LoRA
from lorakit.adapters.methods.method import Adapter, Method

METHODS: dict[str, Method] = {method.name: method for method in (LoRA(), DoRA(), AdaLoRA())}

__all__ = ["METHODS", "Adapter", "Method"]
