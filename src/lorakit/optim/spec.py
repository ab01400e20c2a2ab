"""Which optimizer, with which settings. No torch here, so that a configuration can be checked without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import UsageError
from lorakit.optim.settings import Setting, check, choice, number

_BELOW_ONE = number("a number from 0, below 1", lambda v: 0 <= v < 1)

# The names that a configuration gives, and the settings beyond adam_beta1, adam_beta2, adam_epsilon
# and weight_decay.
OPTIMIZERS: dict[str, Mapping[str, Setting]] = {
    "adamw_torch": {},
    "adamw_8bit": {},
    "paged_adamw_8bit": {},
    "paged_adamw_32bit": {},
    "adafactor": {},
    "sgd": {"momentum": _BELOW_ONE, "dampening": _BELOW_ONE, "nesterov": choice(True, False)},
}
ALIASES = {
    "adamw_torch_fused": "adamw_torch",  # always fused
    "adamw_hf": "adamw_torch",  # the same algorithm; transformers no longer has its own
    "adamw_bnb_8bit": "adamw_8bit",
}
OF_BITSANDBYTES = frozenset(("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"))
BITSANDBYTES_REMEDY = "pip install 'bitsandbytes>=0.50', or write optim: adamw_torch"


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer and its numbers.

    Attributes:
        name: a name of `OPTIMIZERS`, or of `ALIASES`.
        rate: the learning rate that it starts with; a schedule changes it.
        betas: decay of AdamW's two moments; without meaning for the others, as is ``epsilon``.
        weight_decay: decoupled (arXiv 1711.05101); for sgd it is added to the gradient, as torch does.
        ratio: of the rate of B to that of the rest (LoRA+); one rate if None.
        args: settings of this optimizer alone, see `OPTIMIZERS`.

    Raises:
        UsageError: an unknown name, or settings that it does not have or cannot use.
    """

    name: str
    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    ratio: float | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", ALIASES.get(self.name, self.name))
        check_optimizer(self.name, self.args)


def check_optimizer(name: str, args: Mapping[str, Any]) -> None:
    """Refuse an optimizer that is not there, and settings that it cannot use.

    Raises:
        UsageError: naming the key of the configuration.
    """
    name = ALIASES.get(name, name)
    if name not in OPTIMIZERS:
        raise UsageError(f"optim: there is no {name}", remedy=f"there are {', '.join(OPTIMIZERS)}")
    check("optim_args", name, args, OPTIMIZERS[name])
    if args.get("nesterov") and (not args.get("momentum") or args.get("dampening")):
        raise UsageError("optim_args: nesterov needs a momentum above 0, and no dampening")
