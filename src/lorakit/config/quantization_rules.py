"""Which keys about the base's quantisation contradict each other, and which have no effect."""

from __future__ import annotations

from lorakit.config.rules import Rule
from lorakit.config.schema import TrainConfig


def asked_bits(run: TrainConfig) -> set[int]:
    """The numbers of bits that the keys which tell them name."""
    four, eight = run.use_qlora or run.load_in_4bit, run.load_in_8bit
    return {bits for bits, asked in ((run.quantization_bit, True), (4, four), (8, eight)) if bits and asked}


def _idle(key: str) -> Rule:
    """A warning of a key that tells how to quantise where nothing is quantised."""
    return Rule(
        (key,),
        lambda run: dict(run)[key] not in (None, "native") and not asked_bits(run),
        f"`{key}` has no effect, as the base is not quantised",
        "add `quantization_bit: 4`, or remove it",
    )


QUANTIZATION_CONTRADICTIONS = (
    Rule(
        ("quantization_bit", "use_qlora", "load_in_4bit", "load_in_8bit"),
        lambda run: len(asked_bits(run)) > 1,
        "the base cannot have 4 and 8 bits at once",
        "keep one of the keys",
    ),
    Rule(
        ("quantization_type", "double_quantization", "quantization_bit", "load_in_8bit"),
        lambda run: asked_bits(run) == {8} and bool(run.quantization_type or run.double_quantization),
        "`quantization_type` and `double_quantization` are about 4 bits, and 8 are asked for",
        "remove them, or write `quantization_bit: 4`",
    ),
    Rule(
        ("llm_int8_threshold", "int8_compute", "quantization_bit", "use_qlora", "load_in_4bit"),
        lambda run: asked_bits(run) == {4} and bool(run.llm_int8_threshold or run.int8_compute),
        "`llm_int8_threshold` and `int8_compute` are about 8 bits, and 4 are asked for",
        "remove them, or write `quantization_bit: 8`",
    ),
    Rule(
        ("int8_compute", "quantization_method"),
        lambda run: run.int8_compute is not None and run.quantization_method == "bitsandbytes",
        "`int8_compute` is about lorakit's own layers, and bitsandbytes' are asked for",
        "keep one of them",
    ),
    Rule(
        ("init_lora_weights", "quantization_bit"),
        lambda run: run.init_lora_weights == "loftq" and not asked_bits(run),
        "the start `loftq` makes up for what quantisation loses, and the base is not quantised",
        "add `quantization_bit: 4`",
    ),
    Rule(
        ("unfreeze_after", "quantization_bit", "use_qlora", "load_in_4bit", "load_in_8bit"),
        lambda run: run.unfreeze_after is not None and bool(asked_bits(run)),
        "`unfreeze_after` trains the base's own weights, and quantised ones cannot be trained",
        "remove the quantisation keys, or `unfreeze_after`",
    ),
)

QUANTIZATION_WARNINGS = (
    _idle("quantization_method"),
    _idle("quantization_type"),
    _idle("double_quantization"),
    _idle("bnb_4bit_compute_dtype"),
    _idle("llm_int8_threshold"),
    _idle("int8_compute"),
    _idle("llm_int8_skip_modules"),
)
