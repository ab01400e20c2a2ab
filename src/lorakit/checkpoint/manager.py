"""`LoRAManager`: save, load, merge, switch and combine the adapters of one model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from lorakit.adapters.attach import (
    activate,
    adapter_names,
    attach,
    carriers,
    merge,
    remove_adapter,
    route,
    unmerge,
)
from lorakit.adapters.spec import LoRAConfig
from lorakit.checkpoint.convert import Rule, combine
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
        return adapter_names(self.model)

    def add_adapter(self, name: str, config: LoRAConfig, *, seed: int | None = None) -> None:
        """Attach one more adapter and make it the active one."""
        attach(self.model, config, name, seed=seed)

    def set_adapter(self, names: str | Iterable[str]) -> None:
        """Use these adapters, summed, from now on."""
        activate(self.model, *([names] if isinstance(names, str) else names))

    def disable_adapters(self) -> None:
        """Use the base model alone from now on."""
        activate(self.model)

    def route(self, rows: Sequence[str | Iterable[str] | None]) -> AbstractContextManager[None]:
        """``with manager.route(["law", "med", None]):`` an adapter, several or none a row of the batch."""
        return route(self.model, rows)

    def combine_adapters(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        new_name: str,
        rule: Rule = "cat",
        *,
        r: int | None = None,
        density: float = 0.5,
        seed: int = 0,
    ) -> float:
        """Attach and activate a weighted combination, see `combine`; returns what cutting to rank r cost."""
        return combine(self.model, names, weights, new_name, rule, r=r, density=density, seed=seed)

    def delete_adapter(self, name: str) -> None:
        """Take an adapter off for good."""
        carriers(self.model, name)
        remove_adapter(self.model, name)

    def save_lora_checkpoint(self, path: str | Path, adapter_name: str = "default") -> Path:
        """Write a PEFT folder, or one file if ``path`` ends in .pth, in place of what is there."""
        return save_adapter(self.model, Path(path), adapter_name)

    def load_lora_checkpoint(
        self, path: str | Path, adapter_name: str = "default", *, check_base: bool = True
    ) -> None:
        """Attach the adapter of a PEFT folder or ``.pth`` file, in place of one of that name.

        If a tensor, or (with ``check_base``) the base model, does not match, nothing changes.
        """
        load_adapter(self.model, Path(path), adapter_name, check_base=check_base)

    def merge_lora_weights(self, adapter_names: Iterable[str] | None = None) -> None:
        """Fold the adapters (the active ones if not named) into the base weights.

        ``model.state_dict()`` is then that of the plain model.
        """
        merge(self.model, adapter_names)

    def unmerge_lora_weights(self) -> None:
        """Put the base weights back, bit for bit."""
        unmerge(self.model)
