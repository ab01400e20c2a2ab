"""A plan as a picture: where the bytes go, and the way down to a sparing setup."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import UsageError
from lorakit.files import write_with
from lorakit.planning.memory import Memory
from lorakit.planning.plan import Plan

_SUFFIXES = (".png", ".svg")
_COLOURS = {
    "weights": "#4c72b0", "constants": "#7aa6d8", "adapters": "#55a868", "gradients": "#8fca9f",
    "optimizer": "#c5e3cc", "activations": "#dd8452", "logits": "#f2b894", "workspace": "#937860",
    "framework": "#b8b8b8",
}  # fmt: skip


def draw(plan: Plan, path: Path) -> Path:
    """Write the picture: a bar for the setup, and one for each step of the waterfall.

    Raises:
        UsageError: another kind of file than .png and .svg, or matplotlib is not installed.
        StorageError: it cannot be written.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(
            f"a picture cannot be {path.suffix or 'without a suffix'}", remedy="name it .png or .svg"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a picture needs matplotlib", remedy="pip install matplotlib") from error
    bars = [*((step.name, step.memory) for step in plan.waterfall), ("this setup", plan.memory)]
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, memory) in enumerate(bars):
        left = 0.0
        for name, size in memory.categories().items():
            axes.barh(place, size / 1e9, left=left, color=_COLOURS[name], label=name if place == 0 else None)
            left += size / 1e9
        axes.text(left, place, f" {left:.1f}", va="center")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("GB")
    axes.set_xlim(0, 1.1 * max(_gigabytes(memory) for _, memory in bars))
    axes.set_title(
        f"{plan.facts.name}: {plan.setup.method}, rank {plan.setup.rank}, {plan.setup.length} tokens"
    )
    if plan.fit:
        axes.axvline(plan.fit.limit / 1e9, color="#c44e52", linestyle="--", label="limit")
    axes.legend(loc="lower right", fontsize="small", ncols=2)
    write_with(path, lambda aside: figure.savefig(aside, format=path.suffix[1:].lower()))
    return path


def _gigabytes(memory: Memory) -> float:
    return memory.total / 1e9
