"""What single values cannot tell: keys that contradict each other, and values that deserve a warning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorakit.config.schema import TrainConfig


@dataclass(frozen=True)
class Rule:
    """The keys it looks at (all are shown with their places), when it is broken, and what to say."""

    keys: tuple[str, ...]
    broken: Callable[[TrainConfig], bool]
    message: str
    hint: str


def asked_bits(run: TrainConfig) -> set[int]:
    """The numbers of bits that the keys which tell them name."""
    four, eight = run.use_qlora or run.load_in_4bit, run.load_in_8bit
    return {bits for bits, asked in ((run.quantization_bit, True), (4, four), (8, eight)) if bits and asked}


def _holds_out(run: TrainConfig) -> bool:
    return run.eval_dataset is not None or run.val_size > 0


def _idle(key: str) -> Rule:
    """A warning of a key that tells how to quantise where nothing is quantised."""
    return Rule(
        (key,),
        lambda run: dict(run)[key] not in (None, "native") and not asked_bits(run),
        f"`{key}` has no effect, as the base is not quantised",
        "add `quantization_bit: 4`, or remove it",
    )


CONTRADICTIONS = (
    Rule(
        ("use_adalora", "use_dora"),
        lambda run: run.use_adalora and run.use_dora,
        "`use_adalora` and `use_dora` are two methods",
        "keep one of them",
    ),
    Rule(
        ("use_adalora", "lora_fa"),
        lambda run: run.use_adalora and run.lora_fa,
        "`lora_fa` freezes A, which `use_adalora` trains",
        "keep one of them",
    ),
    Rule(
        ("use_adalora", "use_rslora"),
        lambda run: run.use_adalora and run.use_rslora,
        "`use_rslora` scales by a rank that `use_adalora` changes",
        "keep one of them",
    ),
    Rule(
        ("use_adalora", "init_lora_weights", "pissa_init"),
        lambda run: run.use_adalora and (run.pissa_init or run.init_lora_weights != "kaiming"),
        "`use_adalora` has a start of its own",
        "leave `init_lora_weights` and `pissa_init` out",
    ),
    Rule(
        ("use_adalora", "adalora_target_r", "lora_rank"),
        lambda run: run.use_adalora and (run.adalora_target_r or 0) > run.lora_rank,
        "`adalora_target_r` is more than the `lora_rank` that AdaLoRA starts with",
        "raise `lora_rank`, or lower `adalora_target_r`",
    ),
    Rule(
        ("use_adalora", "loraplus_lr_ratio"),
        lambda run: run.use_adalora and run.loraplus_lr_ratio is not None,
        "`loraplus_lr_ratio` is about a B that starts at zero, which AdaLoRA's does not",
        "keep one of them",
    ),
    Rule(
        ("pissa_init", "init_lora_weights"),
        lambda run: run.pissa_init and not run.init_lora_weights.startswith(("kaiming", "pissa")),
        "`pissa_init` and `init_lora_weights` name two starts",
        "keep one of them",
    ),
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
        ("bf16", "fp16"),
        lambda run: bool(run.bf16 and run.fp16),
        "`bf16` and `fp16` are both true",
        "keep one, or neither to take what the hardware does best",
    ),
    Rule(
        ("warmup_ratio", "warmup_steps"),
        lambda run: run.warmup_ratio > 0 and bool(run.warmup_steps),
        "`warmup_ratio` and `warmup_steps` both set the length of the warm-up",
        "keep one of them",
    ),
    Rule(
        ("gradient_checkpointing", "disable_gradient_checkpointing"),
        lambda run: run.gradient_checkpointing and bool(run.disable_gradient_checkpointing),
        "`gradient_checkpointing` and `disable_gradient_checkpointing` are both true",
        "keep one of them",
    ),
    Rule(
        ("train_on_prompt", "mask_history"),
        lambda run: run.train_on_prompt and run.mask_history,
        "`train_on_prompt` adds loss to the history that `mask_history` takes away",
        "keep one of them",
    ),
    Rule(
        ("tool_format", "template"),
        lambda run: run.tool_format is not None and run.template == "auto",
        "`tool_format` has no effect on the tokenizer's own template, which words tools itself",
        "remove it, or name a `template`",
    ),
    Rule(
        ("packing", "neat_packing"),
        lambda run: run.packing is False and bool(run.neat_packing),
        "`packing` is false but `neat_packing` is true",
        "keep one of them",
    ),
    Rule(
        ("packing", "neat_packing", "group_by_length"),
        lambda run: bool(run.packing or run.neat_packing) and run.group_by_length,
        "packed rows cannot be grouped by length: the long and the short share a sequence",
        "keep one of them",
    ),
    Rule(
        ("packing", "neat_packing", "max_tokens_per_batch"),
        lambda run: bool(run.packing or run.neat_packing) and run.max_tokens_per_batch is not None,
        "with packing, a batch has cutoff_len × per_device_train_batch_size tokens already",
        "remove `max_tokens_per_batch`, or packing",
    ),
    Rule(
        ("max_tokens_per_batch", "cutoff_len"),
        lambda run: run.max_tokens_per_batch is not None and run.max_tokens_per_batch < run.cutoff_len,
        "`max_tokens_per_batch` is less than `cutoff_len`: the longest row would not fit into a batch",
        "raise `max_tokens_per_batch`, or lower `cutoff_len`",
    ),
    Rule(
        ("val_size", "eval_dataset"),
        lambda run: run.val_size > 0 and run.eval_dataset is not None,
        "`val_size` and `eval_dataset` both say which rows are held out",
        "keep one of them",
    ),
    Rule(
        ("val_size",),
        lambda run: run.val_size >= 1 and not run.val_size.is_integer(),
        "`val_size` is neither a share below 1 nor a whole number of rows",
        "write 0.1 for a tenth of the rows, 100 for a hundred rows",
    ),
    Rule(
        ("interleave_probs", "mix_strategy"),
        lambda run: run.interleave_probs is not None and run.mix_strategy == "concat",
        "`interleave_probs` has no meaning when data sets come one after the other",
        "write `mix_strategy: interleave_under`, or remove the key",
    ),
    Rule(
        ("interleave_probs", "dataset"),
        lambda run: run.interleave_probs is not None and len(run.interleave_probs) != len(run.dataset),
        "`interleave_probs` needs one number for each data set of `dataset`",
        "give as many as there are data sets",
    ),
    Rule(
        ("interleave_probs",),
        lambda run: run.interleave_probs is not None and not any(run.interleave_probs),
        "`interleave_probs` are all zero",
        "give at least one of them a share",
    ),
    Rule(
        ("do_eval", "eval_dataset"),
        lambda run: bool(run.do_eval) and not _holds_out(run),
        "`do_eval` is true but there is no `eval_dataset`",
        "add `eval_dataset: held-out.jsonl`",
    ),
    Rule(
        ("eval_on_start", "eval_dataset"),
        lambda run: run.eval_on_start and not _holds_out(run),
        "`eval_on_start` is true but there is no `eval_dataset`",
        "add `eval_dataset: held-out.jsonl`",
    ),
    Rule(
        ("predict_with_generate", "eval_dataset"),
        lambda run: run.predict_with_generate and not _holds_out(run),
        "`predict_with_generate` is true but there is no `eval_dataset`",
        "add `eval_dataset: held-out.jsonl`",
    ),
    Rule(
        ("eval_on_start", "do_eval"),
        lambda run: run.eval_on_start and run.do_eval is False,
        "`eval_on_start` is true but `do_eval` is false",
        "keep one of them",
    ),
    Rule(
        ("predict_with_generate", "do_eval"),
        lambda run: run.predict_with_generate and run.do_eval is False,
        "`predict_with_generate` is true but `do_eval` is false",
        "keep one of them",
    ),
)

WARNINGS = (
    Rule(
        ("learning_rate",),
        lambda run: not 1e-5 <= run.learning_rate <= 5e-3,
        "`learning_rate` is outside the usual range of LoRA",
        "usual are 1e-5 to 5e-3, most often 1e-4 to 3e-4",
    ),
    _idle("quantization_method"),
    _idle("quantization_type"),
    _idle("double_quantization"),
    _idle("bnb_4bit_compute_dtype"),
    _idle("llm_int8_threshold"),
    _idle("int8_compute"),
    _idle("llm_int8_skip_modules"),
)
