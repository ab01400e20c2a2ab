"""Triton kernels of the package liger-kernel in a model on a GPU: norms, gated MLPs and rotary positions.

They are for GPUs and were never run on one: liger-kernel 0.8.5 was put into a model and taken out again. The
loss stays lorakit's, which makes logits of labelled positions only.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lorakit.errors import UsageError
from lorakit.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FAMILIES = "transformers.models."
_MISSING = object()


@contextlib.contextmanager
def liger(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, what liger-kernel knows of this model computes by its kernels; no effect on a CPU.

    The package replaces names in transformers' module of the family, too; both come back.

    Raises:
        UsageError: the package is not installed.
    """
    if model.device.type == "cpu":
        logger.info("enable_liger_kernel: the model is on a CPU, where lorakit's own passes are used")
        yield
        return
    apply, known = _package()
    family = model.config.get_text_config().model_type
    if family not in known:
        logger.info("enable_liger_kernel: liger-kernel has no kernels for %s", family)
        yield
        return
    places = [_module(model), *model.modules()]
    before = [dict(vars(place)) for place in places]
    apply(model, cross_entropy=False, fused_linear_cross_entropy=False)
    changed = [_changes(own, vars(place)) for place, own in zip(places, before, strict=True)]
    try:
        yield
    finally:
        for place, names in zip(places, changed, strict=True):
            for name, value in names.items():
                if value is _MISSING:
                    delattr(place, name)
                else:
                    setattr(place, name, value)


def _module(model: PreTrainedModel) -> Any:
    """The module of transformers that defines the family."""
    return next(
        sys.modules[each.__module__] for each in type(model).__mro__ if each.__module__.startswith(_FAMILIES)
    )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The former values of what has another one now."""
    return {name: before.get(name, _MISSING) for name in now if now[name] is not before.get(name, _MISSING)}


def _package() -> tuple[Any, Any]:
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise UsageError(
            f"enable_liger_kernel: the package cannot be imported ({error})",
            remedy="pip install liger-kernel, or leave the key out",
        ) from error
    return monkey_patch._apply_liger_kernel_to_instance, monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
