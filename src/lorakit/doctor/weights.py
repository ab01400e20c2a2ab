"""Rules about the trained adapter: nothing in it, too much in it, more rank than it uses, or all of it."""

from __future__ import annotations

import statistics

from lorakit.doctor.evidence import AdapterEvidence, Evidence
from lorakit.doctor.finding import Finding
from lorakit.doctor.lines import rank, rate, warm_up, wider

_DEAD = 1e-6  # of the median update
_EXPLODED = 3.0  # ‖ΔW‖ over ‖W‖; of healthy runs it is 0.001 to 0.2, of tiny random models up to 1.6
_GROWN = 10.0  # gradient norm at the end over that at the start
_FULL = 0.9  # of the rank, on average
_HIGHEST = 64


def damaged(e: Evidence) -> Finding | None:
    """An adapter that cannot be read, or holds NaN (D11)."""
    adapter = _adapter(e)
    if adapter.unreadable is None and not adapter.non_finite:
        return None
    what = adapter.unreadable or f"{len(adapter.non_finite)} tensors hold NaN or infinity"
    return Finding(
        "damaged",
        "severe",
        f"the adapter cannot be used: {what}",
        {"tensors": len(adapter.non_finite), "first": adapter.non_finite[0] if adapter.non_finite else ""},
        ("resume_from_checkpoint=true",),
        "`lorakit inspect` shows every tensor; a checkpoint of the run may be whole",
    )


def dead(e: Evidence) -> Finding | None:
    """Modules whose update is zero although they trained (D11). AdaLoRA takes ranks away on purpose."""
    updates = _adapter(e).updates
    if not updates or e.settings.get("use_adalora"):
        return None
    middle = statistics.median(update.norm for update in updates)
    found = [update.module for update in updates if update.norm <= _DEAD * middle]
    if not found:
        return None
    everything = len(found) == len(updates)
    return Finding(
        "dead-adapters",
        "severe" if everything else "warning",
        f"the updates of {len(found)} of {len(updates)} modules are zero: they have learned nothing",
        {"dead": len(found), "modules": len(updates), "first": found[0], "median_norm": middle},
        (rate(e, 10.0),) if everything else _without(found, [update.module for update in updates]),
        "no gradient has reached them: their output is multiplied by zero further on, or the rate is zero",
    )


def exploding(e: Evidence) -> Finding | None:
    """Updates larger than the weights they change, or gradients that grow through the run (D09)."""
    adapter = _adapter(e)
    norms = {update.module: update.norm for update in adapter.updates}
    shares = {module: norms[module] / norm for module, norm in adapter.weight_norms.items() if norm > 0}
    worst = max(shares, key=lambda module: shares[module], default=None)
    points = [p.grad_norm for p in e.train if p.grad_norm is not None]
    quarter = len(points) // 4
    first, last = (
        (statistics.median(points[:quarter]), statistics.median(points[-quarter:])) if quarter else (0.0, 0.0)
    )
    grown = first > 0 and last > max(_GROWN * first, _GROWN * e.number("max_grad_norm", 1.0))
    large = worst is not None and shares[worst] > _EXPLODED
    if not (grown or large):
        return None
    known: dict[str, float | int | str] = {"first_grad_norm": first, "last_grad_norm": last}
    if worst is not None:
        known |= {"update_over_weight": shares[worst], "module": worst}
    return Finding(
        "exploding-norms",
        "severe" if large else "warning",
        "updates are several times as large as the weights they change"
        if large
        else "gradients grew through the run",
        known,
        (f"{rate(e, 0.1)} {warm_up(e)}", "weight_decay=0.01", "max_grad_norm=0.5"),
        "an adapter corrects its base; one that outweighs it has replaced it",
    )


def rank_too_large(e: Evidence) -> Finding | None:
    """Nearly all of the updates in a quarter of the ranks (H03)."""
    adapter, r = _adapter(e), _rank(e)
    needed = adapter.needed_rank
    if r < 8 or not 0 < needed <= r // 4 or not _one_rank(e) or exploding(e):
        return None
    return Finding(
        "rank-too-large",
        "hint",
        f"99 % of what was learned is in {needed} of {r} ranks",
        {"rank": r, "needed_rank": needed, "mean_effective_rank": adapter.effective_rank},
        (rank(e, max(1, 2 ** (needed - 1).bit_length())),),
        "a smaller rank would have done; `lorakit compress` makes this adapter smaller and measures the loss",
    )


def rank_saturated(e: Evidence) -> Finding | None:
    """All ranks in full use by a training that came to rest at a high loss (D01, D08)."""
    adapter, r, curve = _adapter(e), _rank(e), e.curve
    if curve is None or r >= _HIGHEST or not _one_rank(e) or exploding(e):
        return None
    at_rest = curve.unfinished < 0.4 and 0.05 < curve.drop < 0.8 and curve.end > 0.1
    if adapter.needed_rank < r or adapter.effective_rank < _FULL * r or not at_rest:
        return None
    return Finding(
        "rank-saturated",
        "warning",
        "all ranks are in full use, and the loss came to rest above what more of them might reach",
        {"rank": r, "mean_effective_rank": adapter.effective_rank, "first_loss": curve.start,
         "last_loss": curve.end},
        (rank(e, 4 * r), *wider(e)),
        "the training wants more directions than it was given",
    )  # fmt: skip


def _rank(e: Evidence) -> int:
    return int(e.number("lora_rank", 8))


def _without(dead: list[str], modules: list[str]) -> tuple[str, ...]:
    """Lines that leave dead modules out, by name or by block, if that leaves any."""

    def names(chosen: list[str]) -> set[str]:
        return {module.rpartition(".")[2] for module in chosen}

    def blocks(chosen: list[str]) -> set[int]:
        return {int(part) for module in chosen for part in module.split(".") if part.isdecimal()}

    found = []
    alive_names, alive_blocks = names(modules) - names(dead), blocks(modules) - blocks(dead)
    if alive_names:
        found.append(f"lora_target={','.join(sorted(alive_names))}")
    if alive_blocks:
        found.append(f"layers_to_transform={','.join(map(str, sorted(alive_blocks)))}")
    return tuple(found)


def _one_rank(e: Evidence) -> bool:
    """Whether every module has the rank of the configuration: AdaLoRA chooses, PiSSA is stored at twice it."""
    ranks = {update.r for update in _adapter(e).updates}
    return ranks == {_rank(e)} and not e.settings.get("use_adalora")


def _adapter(e: Evidence) -> AdapterEvidence:
    assert e.adapter is not None
    return e.adapter
