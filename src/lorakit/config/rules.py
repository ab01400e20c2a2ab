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


def _evaluates(run: TrainConfig) -> bool:
    return run.eval_strategy in ("steps", "epoch") or (run.eval_strategy is None and run.eval_steps is not None)


def _recomputes(run: TrainConfig) -> bool:
    return run.gradient_checkpointing or run.disable_gradient_checkpointing is False


def _holds_out(run: TrainConfig) -> bool:
    return run.eval_dataset is not None or run.val_size > 0


_FUSED = ("adamw_torch", "adamw_torch_fused", "adamw_hf")
_ADAM = (0.9, 0.999, 1e-8)  # the defaults
HIGHER_IS_BETTER = ("exact_match", "field_f1")


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
        ("eval_strategy", "eval_steps", "eval_dataset"),
        lambda run: _evaluates(run) and not _holds_out(run),
        "evaluations during training are asked for but nothing is held out",
        "add `eval_dataset: held-out.jsonl`, or `val_size: 0.1`",
    ),
    Rule(
        ("eval_strategy", "do_eval"),
        lambda run: _evaluates(run) and run.do_eval is False,
        "evaluations during training are asked for but `do_eval` is false",
        "keep one of them",
    ),
    Rule(
        ("eval_strategy", "eval_steps"),
        lambda run: run.eval_strategy in ("no", "epoch") and run.eval_steps is not None,
        "`eval_steps` has a meaning only with `eval_strategy: steps`",
        "keep one of them",
    ),
    Rule(
        ("load_best_model_at_end", "eval_strategy"),
        lambda run: run.load_best_model_at_end and not _evaluates(run),
        "`load_best_model_at_end` needs evaluations during training to choose from",
        "add `eval_strategy: steps`",
    ),
    Rule(
        ("early_stopping_steps", "eval_strategy"),
        lambda run: run.early_stopping_steps is not None and not _evaluates(run),
        "`early_stopping_steps` counts evaluations during training, and there are none",
        "add `eval_strategy: steps`",
    ),
    Rule(
        ("metric_for_best_model", "predict_with_generate"),
        lambda run: run.metric_for_best_model in ("exact_match", "field_f1") and not run.predict_with_generate,
        "this `metric_for_best_model` scores generated answers, and none are generated",
        "add `predict_with_generate: true`",
    ),
    Rule(
        ("greater_is_better", "metric_for_best_model"),
        lambda run: (
            run.greater_is_better is not None
            and run.greater_is_better != (run.metric_for_best_model in HIGHER_IS_BETTER)
        ),
        "`greater_is_better` is the wrong way round for `metric_for_best_model`",
        "remove it: the metric knows",
    ),
    Rule(
        ("save_strategy", "on_nonfinite"),
        lambda run: run.save_strategy == "no" and run.on_nonfinite == "rollback",
        "`on_nonfinite: rollback` needs checkpoints to go back to",
        "remove `save_strategy: no`",
    ),
    Rule(
        ("on_nonfinite", "unfreeze_after"),
        lambda run: run.on_nonfinite == "rollback" and run.unfreeze_after is not None,
        "`on_nonfinite: rollback` cannot go back to before the base began to train",
        "write `on_nonfinite: skip` or `stop`",
    ),
    Rule(
        ("forgetting_text", "unfreeze_after"),
        lambda run: run.forgetting_text is not None and run.unfreeze_after is not None,
        "`forgetting_text` compares with the base, which `unfreeze_after` changes",
        "remove one of them",
    ),
    Rule(
        ("load_best_model_at_end", "unfreeze_after"),
        lambda run: run.load_best_model_at_end and run.unfreeze_after is not None,
        "`load_best_model_at_end` cannot go back to before the base began to train",
        "keep one of them",
    ),
    Rule(
        ("optim", "adam_beta1", "adam_beta2", "adam_epsilon"),
        lambda run: (
            run.optim in ("sgd", "adafactor") and (run.adam_beta1, run.adam_beta2, run.adam_epsilon) != _ADAM
        ),
        "`adam_beta1`, `adam_beta2` and `adam_epsilon` belong to AdamW, not to this `optim`",
        "remove them",
    ),
    Rule(
        ("warmup_start_factor", "warmup_ratio", "warmup_steps"),
        lambda run: run.warmup_start_factor > 0 and not (run.warmup_ratio or run.warmup_steps),
        "`warmup_start_factor` is where a warm-up starts, and there is none",
        "add `warmup_ratio: 0.1`",
    ),
    Rule(
        ("gradient_checkpointing_every", "gradient_checkpointing"),
        lambda run: run.gradient_checkpointing_every > 1 and not _recomputes(run),
        "`gradient_checkpointing_every` has no effect without `gradient_checkpointing: true`",
        "add it",
    ),
    Rule(
        ("offload_activations", "gradient_checkpointing"),
        lambda run: run.offload_activations and not _recomputes(run),
        "`offload_activations` moves what recomputation starts from, and nothing is recomputed",
        "add `gradient_checkpointing: true`",
    ),
    Rule(
        ("max_memory_gb", "auto_find_batch_size"),
        lambda run: run.max_memory_gb is not None and not run.auto_find_batch_size,
        "`max_memory_gb` bounds a search that is not asked for",
        "add `auto_find_batch_size: true`",
    ),
    Rule(
        ("auto_find_batch_size", "max_tokens_per_batch"),
        lambda run: run.auto_find_batch_size and run.max_tokens_per_batch is not None,
        "`auto_find_batch_size` counts rows, `max_tokens_per_batch` tokens",
        "keep one of them",
    ),
    Rule(
        ("deepspeed", "fsdp"),
        lambda run: run.deepspeed is not None and run.fsdp,
        "`deepspeed` and `fsdp` both say how the processes share the work",
        "keep one of them",
    ),
    Rule(
        ("deepspeed", "optim"),
        lambda run: run.deepspeed is not None and run.optim not in (*_FUSED, "sgd"),
        "DeepSpeed cuts tensors in parts, and this `optim` needs them whole",
        "write `optim: adamw_torch`",
    ),
    Rule(
        ("fsdp", "unfreeze_after", "optim"),
        lambda run: run.fsdp and run.unfreeze_after is not None and run.optim not in (*_FUSED, "sgd"),
        "the base trains in parts under `fsdp`, and this `optim` needs tensors whole",
        "write `optim: adamw_torch`",
    ),
    Rule(
        ("deepspeed", "unfreeze_after"),
        lambda run: run.deepspeed is not None and run.unfreeze_after is not None,
        "a second stage cannot begin inside a run under DeepSpeed",
        "use `fsdp: true`, or make the second stage a run of its own",
    ),
    Rule(
        ("deepspeed", "use_adalora"),
        lambda run: run.deepspeed is not None and run.use_adalora,
        "AdaLoRA needs whole gradients, which DeepSpeed keeps in parts",
        "use `fsdp: true`, or neither",
    ),
    Rule(
        ("unfreeze_learning_rate", "unfreeze_after"),
        lambda run: run.unfreeze_learning_rate is not None and run.unfreeze_after is None,
        "`unfreeze_learning_rate` is about the second stage, and there is none",
        "add `unfreeze_after: 0.5`, or remove the key",
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
