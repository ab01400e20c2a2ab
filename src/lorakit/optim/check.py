"""Whether a configuration's optimizer and schedule can be built, before anything is loaded; no torch here."""

from __future__ import annotations

import importlib.util

from lorakit.config.resolve import Resolved
from lorakit.errors import UsageError
from lorakit.optim.schedule import check_schedule
from lorakit.optim.settings import parse
from lorakit.optim.spec import BITSANDBYTES_REMEDY, OF_BITSANDBYTES, OptimizerSpec


def optimizer_spec(settings: Resolved) -> OptimizerSpec:
    """The optimizer that the configuration describes.

    Raises:
        UsageError: settings that it does not have or cannot use.
    """
    return OptimizerSpec(
        name=settings.optim,
        rate=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        ratio=settings.loraplus_lr_ratio,
        args=parse(settings.optim_args) if settings.optim_args else {},
    )


def check_numbers(settings: Resolved) -> None:
    """Refuse settings of optimizer and schedule that cannot be used.

    Raises:
        UsageError: naming the key.
    """
    name = optimizer_spec(settings).name
    if name in OF_BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"optim: {name} needs bitsandbytes", remedy=BITSANDBYTES_REMEDY)
    check_schedule(settings.lr_scheduler_type, settings.lr_scheduler_kwargs or {}, settings.learning_rate)
