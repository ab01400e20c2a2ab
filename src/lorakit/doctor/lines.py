"""Lines that several rules propose: values derived from those of the run, ready to be added to a command."""

from __future__ import annotations

from lorakit.doctor.evidence import Evidence


def rate(e: Evidence, factor: float) -> str:
    """The learning rate times ``factor``."""
    return f"learning_rate={e.number('learning_rate', 1e-4) * factor:.2g}"


def warm_up(e: Evidence) -> str:
    """A warm-up, or twice the one that there is."""
    if e.number("warmup_steps") > 0:
        return f"warmup_steps={2 * int(e.number('warmup_steps'))}"
    return f"warmup_ratio={min(2 * e.number('warmup_ratio'), 0.5) or 0.1:.2g}"


def length(e: Evidence, factor: float) -> str:
    """A training ``factor`` times as long."""
    if e.settings.get("max_steps") is not None:
        return f"max_steps={max(1, round(e.number('max_steps') * factor))}"
    return f"num_train_epochs={e.number('num_train_epochs', 3.0) * factor:.3g}"


def rank(e: Evidence, value: int) -> str:
    """Another rank at the same scaling; twice the rank is the default alpha."""
    ratio = e.number("lora_alpha", 2.0) / max(e.number("lora_rank", 1.0), 1.0)
    return f"lora_rank={value}" if ratio == 2.0 else f"lora_rank={value} lora_alpha={value * ratio:g}"


def batch(e: Evidence, parts: int) -> str:
    """An update's rows in passes of one ``parts``-th of the rows each."""
    rows = int(e.number("per_device_train_batch_size", 1))
    passes = int(e.number("gradient_accumulation_steps", 8))
    size = max(1, rows // parts)
    return f"per_device_train_batch_size={size} gradient_accumulation_steps={max(1, rows * passes // size)}"


def less_memory(e: Evidence) -> tuple[str, ...]:
    """What saves memory, first what leaves the result as it is."""
    settings, found = e.settings, []
    if not settings.get("gradient_checkpointing"):
        found.append("gradient_checkpointing=true")
    if e.number("per_device_train_batch_size", 1) > 1:
        found.append(batch(e, 2))
    if settings.get("quantization_bit") != 4:
        found.append("quantization_bit=4")
    return (*found, f"cutoff_len={max(16, int(e.number('cutoff_len', 2048)) // 2)}")


def wider(e: Evidence) -> tuple[str, ...]:
    """Adapters on all linear layers, if they are not there already."""
    return () if e.settings.get("lora_target") == "all" else ("lora_target=all",)
