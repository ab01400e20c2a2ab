"""`ModuleCopies`: whole modules that are trained and saved with an adapter (PEFT's ``modules_to_save``)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.carrier import Carrier
from lorakit.errors import ConflictError


class ModuleCopies(Carrier):
    """A frozen module beside trainable copies of it, one for each adapter that trains it whole."""

    def make_copy(self) -> nn.Module:
        """One more trainable copy, in float32 or better."""
        module = copy.deepcopy(self.base).requires_grad_(True)
        return module.float() if _dtype(module).itemsize < 4 else module

    def trainable(self) -> list[nn.Parameter]:
        """All parameters of all copies."""
        return list(self.adapters.parameters())

    def run_all(self, names: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The copy instead of the base, in its own number format; the result in the base's."""
        trained, here = self.adapters[self._only(names)], _dtype(self.base)
        y: Tensor = trained(x.to(_dtype(trained)) if x.is_floating_point() else x, *args, **kwargs)
        return y.to(here)

    def run(self, names: tuple[str, ...], x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The copy's output; the base's is not used."""
        return self.run_all(names, x, *args, **kwargs)

    def _put_merged(self, names: tuple[str, ...]) -> nn.Module:
        """A copy, rounded to the base's dtype; the base itself if no adapter of ``names`` has one here."""
        original, here = self.base, self.present(names)
        if here:
            trained = self.adapters[self._only(here)]
            self.base = copy.deepcopy(trained).to(_dtype(original)).requires_grad_(False)
        return original

    def _put_back(self, original: nn.Module) -> None:
        self.base = original

    def _only(self, names: tuple[str, ...]) -> str:
        if len(names) > 1:
            raise ConflictError(
                f"{', '.join(names)} each bring a whole copy of one module, and copies cannot be summed",
                remedy="activate one of them",
            )
        return names[0]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters())
