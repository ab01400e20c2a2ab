"""What carries adapters: a module in the place of a frozen one, with named adapters and a route."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.adapters.routing import BASE, Route
from lorakit.errors import ConflictError, UsageError


@dataclass
class _Passes:
    """The forward passes of a layer since a backward pass last came by."""

    route: Route | None = None
    ambiguous: bool = False
    returned: bool = False
    refusals: int = 0
    all_refusals: ClassVar[int] = 0  # each ends a backward pass that other layers then never see

    def note(self, route: Route) -> None:
        """One more, with this route."""
        differs = self.route is not None and self.route != route
        settled = self.returned or self.refusals != _Passes.all_refusals
        self.ambiguous = not settled and (self.ambiguous or differs)
        self.route, self.returned, self.refusals = route, False, _Passes.all_refusals

    def come_back(self, _: Tensor) -> None:
        """A backward pass has reached the layer."""
        self.returned = True


class Carrier(nn.Module, abc.ABC):
    """A frozen base module with any number of named adapters, of which the route's are active.

    The base module stays the very object it was: detaching gives it back.
    """

    base: nn.Module
    adapters: nn.ModuleDict

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.route: Route = BASE
        self._unmerged: nn.Parameter | nn.Module | None = None
        self._passes = {True: _Passes(), False: _Passes()}  # in training, in evaluation
        self.register_state_dict_post_hook(_plain_when_merged)

    @abc.abstractmethod
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that belong to adapters and that training may change."""

    @abc.abstractmethod
    def run(self, names: tuple[str, ...], x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output with the adapters ``names``, from the input x and the base's output y."""

    @abc.abstractmethod
    def _put_merged(self, names: tuple[str, ...]) -> nn.Parameter | nn.Module:
        """Put what base and adapters compute in the original's place, and return the original."""

    @abc.abstractmethod
    def _put_back(self, original: Any) -> None:
        """Put the original in its place again."""

    @property
    def merged(self) -> bool:
        """Whether the base currently computes what base and adapters do."""
        return self._unmerged is not None

    def merge(self, names: tuple[str, ...] | None = None) -> None:
        """Fold the adapters ``names`` (the route's if not given) into the base, so that it can be undone."""
        if self.merged:
            raise ConflictError("the adapters are merged already", remedy="call unmerge_lora_weights() first")
        self._unmerged = self._put_merged(self.present(self.route.names) if names is None else names)

    def unmerge(self) -> None:
        """Undo `merge`: the original is restored, never recomputed. Nothing to do if not merged."""
        if self.merged:
            self._put_back(self._unmerged)
            self._unmerged = None

    def fold(self) -> None:
        """Merge for good: the original is forgotten."""
        if not self.merged:
            self.merge()
        self._unmerged = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus what the route's adapters change; the base alone while merged."""
        route, come_back = self.routed()
        y = self._along(route, x, *args, **kwargs)
        if come_back is not None and y.requires_grad:
            y.register_hook(come_back)
        return y

    def routed(self) -> tuple[Route, Callable[[Tensor], None] | None]:
        """The route of this pass, and what the output is to call when a backward pass reaches it."""
        if torch.compiler.is_compiling():
            return self.route, None
        passes = self._passes[self.training]
        if torch._C._current_graph_task_id() != -1:  # in a backward pass: activation checkpointing
            return self._recomputed(passes), None
        passes.note(self.route)
        return self.route, passes.come_back

    def _along(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged and route.rows is not None:
            raise ConflictError("the adapters are merged, rows cannot differ", remedy="unmerge them first")
        if route.rows is not None and self.present(route.used):
            return self._by_row(route, x, *args, **kwargs)
        names = () if self.merged else self.present(route.names)
        return self.run_all(names, x, *args, **kwargs) if names else self.base(x, *args, **kwargs)

    def run_all(self, names: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Every row through the adapters ``names``."""
        return self.run(names, x, self.base(x, *args, **kwargs), *args, **kwargs)

    def present(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of ``names`` that this layer carries."""
        return tuple(name for name in names if name in self.adapters)

    def remove_adapter(self, name: str) -> None:
        """Take the adapter ``name`` off, if it is here, and out of the route."""
        if name in self.adapters:
            del self.adapters[name]
            self.route = Route(tuple(other for other in self.route.names if other != name))

    def _by_row(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(route.rows or ()) != x.shape[0]:
            raise UsageError(
                f"the route names adapters for {len(route.rows or ())} rows, the input has {x.shape[0]}",
                remedy="give one entry for each row of the batch",
            )
        y: Tensor = self.base(x, *args, **kwargs)
        for names, rows in route.groups().items():
            if here := self.present(names):
                index = torch.tensor(rows, device=x.device)
                y = y.index_copy(0, index, self.run(here, x[index], y[index], *args, **kwargs))
        return y

    def _recomputed(self, passes: _Passes) -> Route:
        """The route of the forward pass that is being recomputed; the present one may be another by now."""
        if passes.ambiguous:
            _Passes.all_refusals += 1
            raise ConflictError(
                "several routes were used since the last backward pass: which one to recompute is unknown",
                remedy="call backward() after each forward pass, or turn activation checkpointing off",
            )
        passes.returned = True
        return passes.route or self.route

    def __getattr__(self, name: str) -> Any:
        """What model code reads of the module that it believes to have (``weight``, ``in_features`` …)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base"), name)


def _plain_when_merged(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A merged layer saves as the plain module that it then is: the file loads without lorakit."""
    assert isinstance(layer, Carrier)
    if layer.merged:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]
        state.update({prefix + key: value for key, value in layer.base.state_dict().items()})
