"""Every key a run understands, with its type, its range, its default and its help text.

The names are LLaMA-Factory's, so that its files run here. A value is never coerced: ``true`` is not 1 and
``"8"`` is not 8, for a slip that trains a different model is worse than an error.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import sys
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lorakit.config.names import (
    AlphaMode,
    LongRows,
    OptimizerName,
    PresetName,
    ScheduleName,
    TemplateName,
    ToolFormat,
)

_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)


def _split(value: Any) -> Any:
    """``a, b`` and ``[a, b]`` are the same list."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


def _split_targets(value: Any) -> Any:
    """``all``, names, or one regular expression: text with a character that no module name has."""
    if isinstance(value, str) and set(value) & set(r"\^$*+?()[]{}|"):
        return (value,)
    names = _split(value)
    return "all" if names == ("all",) else names


def _numbers(value: Any) -> Any:
    """One number is a list of one."""
    return (value,) if type(value) is int else tuple(value) if isinstance(value, list) else value


def _split_numbers(value: Any) -> Any:
    """``0.7, 0.3`` and ``[0.7, 0.3]`` are the same list; what is no number stays text, and is refused."""
    parts = (value,) if type(value) in (int, float) else _split(value)
    if not isinstance(parts, tuple):
        return parts
    return tuple(float(part) if isinstance(part, str) and _NUMBER.fullmatch(part) else part for part in parts)


def _metric(value: Any) -> Any:
    """The Hugging Face trainer writes ``eval_`` before the names of what it measures."""
    return value.removeprefix("eval_") if isinstance(value, str) else value


def _trackers(value: Any) -> Any:
    """``none`` is an empty list; ``all`` names every one."""
    names = _split(value)
    return () if names in (("none",), ()) else TRACKERS if names == ("all",) else names


def _fsdp(value: Any) -> Any:
    """The Hugging Face trainer's words for the same: ``full_shard``, with or without ``auto_wrap``."""
    words = set(value.split()) if isinstance(value, str) else {None}
    return bool(words) if words <= {"full_shard", "auto_wrap"} else value


def _method(value: Any) -> Any:
    """``bnb`` is LLaMA-Factory's name of bitsandbytes."""
    return "bitsandbytes" if value == "bnb" else value


def _endless(value: Any) -> Any:
    """-1 is what the Hugging Face trainer writes for "as many steps as the epochs give"."""
    return None if type(value) is int and value == -1 else value


Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
Names = Annotated[tuple[Text, ...], Field(min_length=1)]
Paths = Annotated[Names, BeforeValidator(_split)]
Count = Annotated[int, Field(ge=1)]
STARTS = "kaiming|gaussian|normal|scaled_normal|orthogonal|pissa|olora|loftq"
Start = Annotated[str, Field(pattern=rf"^({STARTS}|pissa_niter_[0-9]{{1,3}})$")]
Shares = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
TRACKERS = ("tensorboard", "wandb", "mlflow")


class TrainConfig(BaseModel):
    """What a configuration file says, checked; ``None`` stands for what ``resolve`` works out."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    preset: PresetName | None = None
    """Named settings to start from (`lorakit presets`); every key that is written here wins over them."""

    model_name_or_path: Text
    """Hub id, local folder, GGUF file, or the alias smollm2-135m-instruct."""
    model_revision: Text | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    stage: Literal["sft"] = "sft"
    """Kind of training: supervised fine-tuning."""
    finetuning_type: Literal["lora"] = "lora"
    """What is trained: low-rank adapters on a frozen base."""
    do_train: Literal[True] = True
    """Train; `lorakit evaluate` evaluates alone."""

    lora_rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rank r of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] | AlphaMode | None = None
    """Strength of the update, applied as alpha / rank; also as r, 2r or 4r. Twice the rank if left out."""
    lora_dropout: Fraction = 0.0
    """Share of the adapter's inputs dropped in training."""
    lora_target: Annotated[Literal["all"] | Names, BeforeValidator(_split_targets)] = "all"
    """Names of the layers that carry an adapter, a set (attention, mlp, qv), a regular expression, or all."""
    exclude_modules: Annotated[Names | None, BeforeValidator(_split_targets)] = None
    """Names of layers to leave out, or a regular expression for their paths."""
    layers_to_transform: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...] | Text | None, BeforeValidator(_numbers)
    ] = None
    """Numbers of the blocks that carry adapters, such as [0, 1] or 0-3,8; all if left out."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] | None = None
    """Another lora_rank for the modules that a name or regular expression selects."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Another lora_alpha for the modules that a name or regular expression selects."""
    additional_target: Annotated[Names | None, BeforeValidator(_split)] = None
    """Modules to train whole and save with the adapter."""
    use_rslora: bool = False
    """Scale by alpha / √rank instead of alpha / rank."""
    use_dora: bool = False
    """Train magnitude and direction of the weights apart (DoRA)."""
    lora_fa: bool = False
    """Keep A frozen and train B alone (LoRA-FA)."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """Learning rate of B as a multiple of that of A (LoRA+); one rate if left out."""
    init_lora_weights: Start = "kaiming"
    """Start: kaiming, gaussian, normal, scaled_normal, orthogonal, pissa, pissa_niter_N, olora or loftq."""
    pissa_init: bool = False
    """Start from the weight's leading singular vectors (PiSSA)."""
    pissa_iter: Annotated[int, Field(ge=-1, le=999)] = 16
    """Subspace iterations of PiSSA; -1 for the exact decomposition."""
    use_adalora: bool = False
    """Start with lora_rank everywhere and remove the least important ranks of the whole model (AdaLoRA)."""
    adalora_target_r: Count | None = None
    """Rank per layer, on average, in the end; half of lora_rank if left out."""
    adalora_tinit: Annotated[int, Field(ge=0)] | None = None
    """Updates before ranks are removed; a tenth of all if left out."""
    adalora_tfinal: Annotated[int, Field(ge=0)] | None = None
    """Updates after the last rank is removed; a fifth of all if left out."""
    adalora_delta_t: Count = 1
    """Updates between two choices of the ranks to keep."""

    quantization_bit: Literal[4, 8] | None = None
    """Keep the frozen weights in so few bits (QLoRA); not quantised if left out."""
    quantization_method: Annotated[Literal["native", "bitsandbytes"], BeforeValidator(_method)] = "native"
    """Who computes with them: lorakit, or the layers of bitsandbytes (bnb)."""
    quantization_type: Literal["nf4", "fp4"] | None = None
    """Code of 4 bits; nf4 if left out."""
    double_quantization: bool | None = None
    """Quantise the constants of 4 bits, too; true if left out."""
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Number format of products with quantised weights; the run's precision if left out."""
    llm_int8_threshold: Annotated[float, Field(ge=0)] | None = None
    """With 8 bits, inputs above this are not rounded (LLM.int8); 0 or left out for none."""
    int8_compute: bool | None = None
    """With 8 bits, multiply on integers where that is fast and accurate; true if left out."""
    llm_int8_skip_modules: Annotated[Names | None, BeforeValidator(_split)] = None
    """Names of layers that stay as they are, besides the output head."""
    load_in_4bit: bool | None = None
    """The same as quantization_bit: 4."""
    load_in_8bit: bool | None = None
    """The same as quantization_bit: 8."""
    use_qlora: bool | None = None
    """The same as quantization_bit: 4."""

    dataset: Paths
    """Training rows: files, folders, patterns, names in dataset_info.json, or hub data sets."""
    dataset_dir: Text | None = None
    """Where relative dataset paths and dataset_info.json are; the configuration's folder if left out."""
    eval_dataset: Paths | None = None
    """Held-out rows, named in the same ways."""
    val_size: Annotated[float, Field(ge=0)] = 0.0
    """Hold out this share of the training rows (below 1) or this number of them."""
    max_samples: Count | None = None
    """Use at most this many rows of each data set."""
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = "concat"
    """Data sets one after the other, or in turns until the shortest (under) or longest (over) is used up."""
    interleave_probs: Annotated[Shares | None, BeforeValidator(_split_numbers)] = None
    """How often each data set has its turn; alike if left out."""
    streaming: bool = False
    """Fetch rows of hub data sets as they are needed, not whole data sets first."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or skip it."""
    max_bad_rows: Fraction = 0.05
    """Share of the rows of a data set that may be skipped."""
    cutoff_len: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Longest sequence in tokens."""
    long_rows: LongRows = "truncate"
    """What becomes of longer rows: cut so that an answer stays, dropped, or split into several."""

    template: TemplateName = "auto"
    """Conversation format: the tokenizer's own (auto), or a family's."""
    default_system: Annotated[str, Field(pattern=r"^[^\x00]*$")] | None = None
    """System message of conversations that bring none; empty for none at all."""
    enable_thinking: bool | None = None
    """Whether templates with reasoning open it; they decide themselves if left out."""
    tool_format: ToolFormat | None = None
    """How a named template words tools, if not in its own way."""
    train_on_prompt: bool = False
    """Let everything carry loss, not the answers alone."""
    mask_history: bool = False
    """Of several answers, let only the last one carry loss."""

    packing: bool | None = None
    """Join rows into sequences of up to cutoff_len tokens, none of which sees another; a batch counts these."""
    neat_packing: bool | None = None
    """The same, as LLaMA-Factory writes it: packed rows never see each other here."""
    group_by_length: bool = False
    """Put rows of like length into one batch."""
    max_tokens_per_batch: Count | None = None
    """Tokens in one forward pass, padding counted, instead of a number of rows; groups rows by length."""
    pass_tokens: Annotated[int, Field(ge=0)] | None = None
    """Rows of an update share forward passes of so many tokens; changes nothing else. 0: batches are passes."""
    preprocessing_num_workers: Count | None = None
    """Processes that encode rows; as many as there are cores if left out."""
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    """Accepted for old files, without effect: encoded rows are mapped from disk, no worker is needed."""
    overwrite_cache: bool = False
    """Encode the rows anew, even if they are in the cache."""
    tokenized_path: Text | None = None
    """Folder that keeps encoded rows, instead of lorakit's cache."""

    adapter_name_or_path: Text | None = None
    """Adapter to go on training, in a new run; its own rank, targets and kind hold."""

    output_dir: Text
    """Folder of the run: adapter, checkpoints, metrics, report."""
    overwrite_output_dir: bool = False
    """Replace the results of an earlier run in output_dir."""

    per_device_train_batch_size: Count = 1
    """Sequences in one forward pass."""
    gradient_accumulation_steps: Count = 8
    """Forward passes for one update."""
    per_device_eval_batch_size: Count = 8
    """Sequences in one forward pass of an evaluation."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Highest learning rate of the schedule."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training rows."""
    max_steps: Annotated[Count | None, BeforeValidator(_endless)] = None
    """Number of updates; wins over num_train_epochs."""
    lr_scheduler_type: ScheduleName = "cosine"
    """Course of the learning rate after the warm-up."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Settings of that course, such as {num_cycles: 2} of cosine_with_restarts."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the updates in which the learning rate rises."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same as a number of updates."""
    warmup_start_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of learning_rate that the warm-up starts from."""
    optim: OptimizerName = "adamw_torch"
    """Optimizer; 8bit keeps its state in a quarter of the memory, paged moves it out of a full GPU."""
    optim_args: Text | None = None
    """Settings of the optimizer, such as momentum=0.9 of sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    adam_beta1: Fraction = 0.9
    """Decay of AdamW's mean of the gradient."""
    adam_beta2: Fraction = 0.999
    """Decay of AdamW's mean of the squared gradient."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's guard against division by zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    unfreeze_after: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the updates after which the base trains, too (a second stage); never if left out."""
    unfreeze_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Highest learning rate of the base in the second stage; a tenth of learning_rate if left out."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss or gradient is not finite: stop, leave it out, or go back a checkpoint at half the rate."""
    max_nonfinite_updates: Annotated[int, Field(ge=0)] = 3
    """So many such updates are borne."""

    bf16: bool | None = None
    """Compute in bfloat16; by capability if both this and fp16 are left out."""
    fp16: bool | None = None
    """Accepted for old files, and answered with the best format here: float16 is not built yet."""
    deepspeed: Text | dict[str, Any] | None = None
    """DeepSpeed's JSON file (or what is in it) with ZeRO stage 1, 2 or 3, for several processes."""
    fsdp: Annotated[bool, BeforeValidator(_fsdp)] = False
    """Share the base's weights out among several processes (FSDP2)."""
    ddp_timeout: Count = 1800
    """Seconds that a process waits for the others."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    disable_gradient_checkpointing: bool | None = None
    """The opposite of gradient_checkpointing, as LLaMA-Factory writes it."""
    gradient_checkpointing_every: Count = 1
    """Recompute one of so many blocks, not all of them."""
    offload_activations: bool = False
    """Keep what recomputation starts from in the CPU's memory (GPU only)."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the CPU's memory between updates (GPU only)."""
    torch_compile: bool = False
    """Compile the model's blocks."""
    enable_liger_kernel: bool = False
    """Norms, gated MLPs and rotary positions by the kernels of liger-kernel (GPU only)."""
    auto_find_batch_size: bool = False
    """Find the largest per_device_train_batch_size that fits; an update keeps its number of rows."""
    max_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory that this search may use; nine tenths of what is free if left out."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Seed of initial values, data order and dropout."""

    logging_steps: Count = 10
    """Updates between two log lines."""
    logging_first_step: bool = False
    """Log the first update, too."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When checkpoints are written, from which a run can go on: never, by save_steps, or after every epoch."""
    save_steps: Count = 500
    """Updates between two checkpoints; the last update always has one."""
    save_total_limit: Count | None = None
    """Keep so many checkpoints, and always the newest, the best and the one that was resumed from."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written: go on and try again, or stop."""
    save_fallback_dir: Text | None = None
    """Folder on another disk for checkpoints that the disk of output_dir refuses."""
    resume_from_checkpoint: Text | bool | None = None
    """Checkpoint to go on from: a folder, or true for the newest good one in output_dir."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], BeforeValidator(_trackers)] = ()
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, a list of them, all, or none."""
    run_name: Text | None = None
    """What trackers call the run; the name of output_dir if left out."""
    logging_dir: Text | None = None
    """Folder of TensorBoard's files; in output_dir if left out."""
    plot_loss: bool = True
    """Draw the curves of loss, rate and memory in the report."""

    do_eval: bool | None = None
    """Evaluate after training; true if eval_dataset is given."""
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    """Evaluate during training: never, by eval_steps, or after every epoch; steps if eval_steps is given."""
    eval_steps: Count | None = None
    """Updates between two evaluations; logging_steps if left out."""
    eval_delay: Annotated[int, Field(ge=0)] = 0
    """No evaluation before this update."""
    metric_for_best_model: Annotated[
        Literal["loss", "perplexity", "exact_match", "field_f1"], BeforeValidator(_metric)
    ] = "loss"
    """What makes a model the best: held-out loss, perplexity, or scores of generated answers."""
    greater_is_better: bool | None = None
    """Accepted for old files; the metric knows."""
    load_best_model_at_end: bool = False
    """The adapter of the best evaluation is the result, not that of the last update."""
    early_stopping_steps: Count | None = None
    """Stop after so many evaluations without a better one."""
    eval_on_start: bool = False
    """Evaluate the base model before training, too."""
    predict_with_generate: bool = False
    """Let the evaluation generate answers and compare them with the reference."""
    max_new_tokens: Count = 256
    """Longest generated answer in tokens."""
    forgetting_text: Text | None = None
    """A text file that base and adapter are compared on in the end; `python` for a text that Python brings."""


@functools.cache
def help_texts() -> dict[str, str]:
    """The text under each key of `TrainConfig`, read from this file when a message needs it."""
    module = ast.parse(inspect.getsource(sys.modules[__name__]))
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef))
    texts = {}
    for key, text in itertools.pairwise(body):
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(text, ast.Expr):
            texts[key.target.id] = str(ast.literal_eval(text.value))
    return texts
