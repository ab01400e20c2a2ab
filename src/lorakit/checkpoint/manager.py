"""`LoRAManager`: save, load, merge and switch the adapters of one model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lorakit.adapters.attach import activate, adapter_layers, attach, carriers, remove_adapter
from lorakit.adapters.spec import LoRAConfig
from lorakit.checkpoint.peft_format import load_adapter, save_adapter


class LoRAManager:
    """The adapters of ``model``, by name.

    manager = LoRAManager(add_lora_to_model(model, r=8))
    manager.save_lora_checkpoint("my-adapter")
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of all attached adapters, in the order they came."""
        layers = adapter_layers(self.model).values()
        return tuple(dict.fromkeys(name for layer in layers for name in layer.adapters))

    def add_adapter(self, name: str, config: LoRAConfig, *, seed: int | None = None) -> None:
        """Attach one more adapter and make it the active one."""
        attach(self.model, config, name, seed=seed)

    def set_adapter(self, names: str | list[str]) -> None:
        """Use these adapters, summed, from now on."""
        activate(self.model, *([names] if isinstance(names, str) else names))

    def disable_adapters(self) -> None:
        """Use the base model alone from now on."""
        activate(self.model)

    def delete_adapter(self, name: str) -> None:
        """Take an adapter off for good."""
        carriers(self.model, name)
        remove_adapter(self.model, name)

    def save_lora_checkpoint(self, path: str | Path, adapter_name: str = "default") -> Path:
        """Write a PEFT folder, all of it or nothing; a folder that is there already is replaced."""
        return save_adapter(self.model, Path(path), adapter_name)

    def load_lora_checkpoint(self, path: str | Path, adapter_name: str = "default") -> None:
        """Attach the adapter of a PEFT folder, in place of one of that name; if a tensor does not match,
        nothing changes.
        """
        load_adapter(self.model, Path(path), adapter_name)

    def merge_lora_weights(self, adapter_names: list[str] | None = None) -> None:
        """Fold the adapters (the active ones if not named) into the base weights."""
        for name in adapter_names or ():
            carriers(self.model, name)
        for layer in adapter_layers(self.model).values():
            names = None if adapter_names is None else tuple(n for n in adapter_names if n in layer.adapters)
            layer.merge(names)

    def unmerge_lora_weights(self) -> None:
        """Put the base weights back, bit for bit."""
        for layer in adapter_layers(self.model).values():
            layer.unmerge()
