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
        ("do_eval", "eval_dataset"),
        lambda run: bool(run.do_eval) and run.eval_dataset is None,
        "`do_eval` is true but there is no `eval_dataset`",
        "add `eval_dataset: held-out.jsonl`",
    ),
    Rule(
        ("eval_on_start", "eval_dataset"),
        lambda run: run.eval_on_start and run.eval_dataset is None,
        "`eval_on_start` is true but there is no `eval_dataset`",
        "add `eval_dataset: held-out.jsonl`",
    ),
    Rule(
        ("predict_with_generate", "eval_dataset"),
        lambda run: run.predict_with_generate and run.eval_dataset is None,
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
)
