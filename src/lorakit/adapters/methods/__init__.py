"""Methods: what is trained. Each is one file with one row in `METHODS`."""

from __future__ import annotations

from lorakit.adapters.methods.lora import LoRA
from lorakit.adapters.methods.method import Adapter, Method

METHODS: dict[str, Method] = {"lora": LoRA()}

__all__ = ["METHODS", "Adapter", "Method"]
