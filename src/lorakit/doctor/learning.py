"""Rules about the loss: it did not fall, fell too slowly, ran away, jumped, or fell in training alone."""

from __future__ import annotations

import math
import statistics

from lorakit.doctor.evidence import Evidence
from lorakit.doctor.finding import Finding
from lorakit.doctor.lines import length, rank, rate, warm_up, wider
from lorakit.doctor.weights import exploding

# Judged on real runs (tests/faults/test_doctor_symptoms.py), with room to the healthy ones.
_FLAT, _SLOW = 0.05, 0.2  # share of the loss that was learned
_STILL_LEARNING = 0.5  # fall in the second half of the schedule over that in the first
_LEARNED, _NO_BETTER = 0.95, 0.98  # held-out loss of the adapter over that of the base
_RISEN, _GAP = 1.05, 3.0
_AWAY, _FROM = 2.0, 0.5  # times the lowest loss; below half a nat ratios mean nothing
_CLIPPED = 10.0  # times max_grad_norm
_ROUGH = 0.18
_LEAST_UPDATES = 20


def not_finite(e: Evidence) -> Finding | None:
    """NaN or infinity in a loss or gradient (D04)."""
    ended = [error for error in e.errors if error.code == "E-DIVERGED"]
    passed_over = sum("was not finite" in note for note in e.record.notes)
    bad = [point.step for point in e.train if point.loss is not None and not math.isfinite(point.loss)]
    if not (ended or passed_over or bad):
        return None
    fatal = bool(bad or (ended and e.record.info.status is None))
    remedies = [rate(e, 0.1), "bf16=true"] if e.settings.get("fp16") else [rate(e, 0.1)]
    remedies += [warm_up(e)]
    remedies += ["on_nonfinite=skip"] if e.settings.get("on_nonfinite") == "stop" else []
    return Finding(
        "not-finite",
        "severe" if fatal else "warning",
        "loss or gradient was not finite (NaN or infinity)",
        {
            "updates_refused": max(passed_over, len(ended), len(bad)),
            "learning_rate": e.number("learning_rate"),
            "last_update": e.train[-1].step if e.train else 0,
        },
        tuple(remedies),
        "nonfinite-*.json in the run's folder has the rows and the norm of every gradient; if it is always the "
        "same rows, they are the cause, otherwise the rate",
    )


def running_away(e: Evidence) -> Finding | None:
    """A loss that has risen and not come back (D12)."""
    curve = e.curve
    assert curve is not None
    best = min(curve.lowest, curve.losses[0])
    if curve.end <= max(_AWAY * best, _FROM) or curve.end - best <= 4 * curve.noise:
        return None
    return Finding(
        "running-away",
        "severe",
        "the loss ran away and did not come back",
        {"first_loss": curve.losses[0], "lowest_loss": best, "last_loss": curve.end},
        (f"{rate(e, 0.1)} {warm_up(e)}", "max_grad_norm=0.5"),
        "the steps are too large: a tenth of the rate, reached in a linear warm-up",
    )


def rate_too_high(e: Evidence) -> Finding | None:
    """A loss that first rose above its start, or gradients that are cut to a small part all the time (D09)."""
    curve = e.curve
    assert curve is not None
    if running_away(e):
        return None
    first, highest = curve.losses[0], max(curve.smooth)
    rose = highest > 1.2 * first + 2 * curve.noise and highest > _FROM
    if not rose:
        return None
    return Finding(
        "rate-too-high",
        "warning",
        "the loss rose above its start before it fell",
        {"first_loss": first, "highest_loss": highest, "last_loss": curve.end,
         "learning_rate": e.number("learning_rate")},
        (rate(e, 1 / 3), warm_up(e)),
        "what was learned first was lost again: a smaller rate, or a warm-up",
    )  # fmt: skip


def spikes(e: Evidence) -> Finding | None:
    """Single updates with a far higher loss than their neighbours (D09)."""
    curve = e.curve
    assert curve is not None
    found = curve.spikes()
    if not found or running_away(e):
        return None
    height = max(loss for step, loss in zip(curve.steps, curve.losses, strict=True) if step in found)
    beta = ("adam_beta2=0.95",) if e.number("adam_beta2", 0.999) > 0.95 else ()
    return Finding(
        "spikes",
        "warning",
        f"the loss jumped at {len(found)} log line{'s' if len(found) > 1 else ''} and fell back",
        {"first_at_update": found[0], "spikes": len(found), "highest_loss": height,
         "median_loss": statistics.median(curve.losses)},
        ("max_grad_norm=0.3", "gradient_accumulation_steps="
         f"{2 * int(e.number('gradient_accumulation_steps', 8))}", *beta),
        "odd rows do that, or a rate at the edge: look at the rows with `lorakit preview`, clip harder, or "
        "average over more rows",
    )  # fmt: skip


def flat(e: Evidence) -> Finding | None:
    """A loss that has not moved (D01, D11)."""
    curve = e.curve
    assert curve is not None
    change, error = curve.trend
    still = abs(change) <= 2 * error or abs(change) < 0.005 * curve.start
    if curve.steps[-1] < _LEAST_UPDATES or not still or abs(curve.drop) > _FLAT or curve.start < 0.1:
        return None
    if _learned(e) or _too_fast(e):
        return None
    return Finding(
        "flat-loss",
        "severe",
        "the loss has not moved",
        {"first_loss": curve.start, "last_loss": curve.end, "updates": curve.steps[-1],
         "learning_rate": e.number("learning_rate")},
        (rate(e, max(10.0, 1e-4 / e.number("learning_rate", 1e-4))), *wider(e)),
        "either the rate is far too low, or what trains cannot change the answers: see what carries loss with "
        "`lorakit preview`, and the adapter with `lorakit inspect`",
    )  # fmt: skip


def rate_too_low(e: Evidence) -> Finding | None:
    """A loss that falls, steadily and hardly (D01, D08, D11)."""
    curve = e.curve
    assert curve is not None
    change, error = curve.trend
    slow = e.record.info.status == "finished" and 0 < curve.drop < _SLOW and change < -2 * error
    if (
        curve.steps[-1] < _LEAST_UPDATES
        or not slow
        or curve.unfinished < _STILL_LEARNING
        or flat(e)
        or _too_fast(e)
    ):
        return None
    return Finding(
        "rate-too-low",
        "warning",
        f"the loss fell by {curve.drop:.0%} only, and as fast at the end as at the beginning",
        {"first_loss": curve.start, "last_loss": curve.end, "learned_share": curve.drop,
         "second_half_over_first": curve.unfinished, "learning_rate": e.number("learning_rate")},
        (rate(e, 5.0), length(e, 3.0)),
        "measured in the time of the schedule, so that a rate that sinks to zero is not taken for convergence",
    )  # fmt: skip


def underfitting(e: Evidence) -> Finding | None:
    """A loss that was still falling when the training ended (D01, D08)."""
    curve = e.curve
    assert curve is not None
    if (
        e.record.info.status != "finished"
        or curve.drop < _SLOW
        or curve.unfinished < _STILL_LEARNING
        or overfitting(e)
        or _too_fast(e)
    ):
        return None
    higher = int(e.number("lora_rank", 8)) * 2
    return Finding(
        "underfitting",
        "warning",
        "the training ended while the loss was still falling",
        {"first_loss": curve.start, "last_loss": curve.end, "second_half_over_first": curve.unfinished},
        (length(e, 2.0), rate(e, 2.0), rank(e, higher)),
        "train longer, then with a higher rate, then with a higher rank",
    )


def overfitting(e: Evidence) -> Finding | None:
    """A held-out loss that rises while that of the training falls (D02)."""
    points = [(p.step, p.loss) for p in e.evals if p.loss is not None and math.isfinite(p.loss)]
    if not points:
        return None
    (best_step, best), (last_step, last) = min(points, key=lambda pair: pair[1]), points[-1]
    curve, base = e.curve, e.record.before
    trained = curve.end if curve else None
    base_loss = base.loss if base else None
    risen = last > _RISEN * best and last - best > 0.02 and best_step < last_step
    lost = base_loss is not None and last > _RISEN * base_loss
    apart = trained is not None and last > _GAP * trained and last - trained > 0.5
    knows_more = trained is None or trained < 0.8 * last  # else the training rows fare no better
    if not knows_more or not (risen or lost or apart):
        return None
    share = best_step / last_step if risen else 0.5
    half = max(1, int(e.number("lora_rank", 8)) // 2)
    known = {"held_out_best": best, "held_out_last": last}
    known |= {"best_at_update": best_step, "last_update": last_step}
    known |= {"trained_last": trained} if trained is not None else {}
    known |= {"held_out_base": base_loss} if base_loss is not None else {}
    steps = max(1, last_step // 8)
    watch = "load_best_model_at_end=true early_stopping_steps=2"
    watch += f" eval_strategy=steps eval_steps={steps} save_steps={steps}" if len(points) < 3 else ""
    return Finding(
        "overfitting",
        "severe" if lost else "warning",
        "held-out rows got worse than the base model's answers" if lost
        else "the held-out loss rose while the training loss fell" if risen
        else "training rows are known by heart, held-out ones are not",
        known,
        (length(e, share), watch, "lora_dropout=0.1", rank(e, half)),
        "stop where the held-out loss was lowest; then dropout, a lower rank, more rows",
    )  # fmt: skip


def poor(e: Evidence) -> Finding | None:
    """Held-out rows that the adapter answers no better than the base model (D08, D11)."""
    before, after = e.record.before, e.record.after
    if before is None or after is None or not before.loss or after.loss is None:
        return None
    share = after.loss / before.loss
    answers_more = (after.exact_match or 0.0) > (before.exact_match or 0.0) + 0.05
    known_by_another_name = overfitting(e) or (e.curve and (flat(e) or _too_fast(e)))
    if share <= _NO_BETTER or answers_more or known_by_another_name:
        return None
    higher = rank(e, 2 * int(e.number("lora_rank", 8)))
    worse = share > _RISEN
    return Finding(
        "poor",
        "severe" if worse else "warning",
        f"the adapter answers held-out rows {'worse' if worse else 'no better'} than the base model",
        {"held_out_base": before.loss, "held_out_adapter": after.loss, "rows": after.rows or 0},
        (*wider(e), rate(e, 3.0), higher, length(e, 2.0)),
        "if the training loss did fall, held-out rows ask for something else than training rows teach: look at "
        "both with `lorakit preview`",
    )


def clipping(e: Evidence) -> Finding | None:
    """Gradients that are cut to a small part of themselves in nearly every update (D09)."""
    limit = e.number("max_grad_norm", 1.0)
    norms = [point.grad_norm for point in e.train if point.grad_norm is not None]
    cut = sum(norm > _CLIPPED * limit for norm in norms)
    if len(norms) < 4 or cut < 0.8 * len(norms):
        return None
    return Finding(
        "clipping",
        "warning",
        f"gradients are more than {_CLIPPED:g} times as long as max_grad_norm nearly always",
        {"median_grad_norm": statistics.median(norms), "max_grad_norm": limit, "share": cut / len(norms)},
        (warm_up(e), rate(e, 0.5), f"max_grad_norm={statistics.median(norms):.2g}"),
        "every update then has the same length, whatever the rows say; normal for a start, not for a whole run",
    )


def rough(e: Evidence) -> Finding | None:
    """A loss that swings at a rate that does not sink (D09)."""
    curve = e.curve
    assert curve is not None
    rates = [point.learning_rate for point in e.train if point.learning_rate is not None]
    if not rates or rates[-1] < 0.5 * max(rates) or len(curve.losses) < 10:
        return None
    if curve.roughness < _ROUGH or curve.end < 0.05 or running_away(e):
        return None
    passes = int(e.number("gradient_accumulation_steps", 8))
    return Finding(
        "rough",
        "warning",
        "the loss swings as much as ever, at a rate that does not sink",
        {"noise_over_loss": curve.roughness, "last_rate": rates[-1], "highest_rate": max(rates)},
        ("lr_scheduler_type=cosine", f"gradient_accumulation_steps={2 * passes}"),
        "let the rate sink, or average each update over more rows",
    )


def _too_fast(e: Evidence) -> bool:
    """Whether the rate is too high: what else is seen then asks for no higher one."""
    return bool(running_away(e) or rate_too_high(e) or (e.adapter and exploding(e)))


def _learned(e: Evidence) -> bool:
    """Whether held-out rows say that something was learned, whatever the curve looks like."""
    before, after = e.record.before, e.record.after
    if before is None or after is None or not before.loss or after.loss is None:
        return False
    return after.loss < _LEARNED * before.loss
