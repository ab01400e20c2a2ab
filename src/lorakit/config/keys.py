"""Keys that are known but not built yet, as data: a file that uses one is refused by name, never ignored.

Each entry holds the values that ask for nothing (accepted in silence, as ``null`` always is) and what to do
instead. ``ALIASES`` holds second spellings, ``OTHER_NAMES`` what people from other tools write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unbuilt:
    """A known key without an effect yet: its neutral values, and why any other is refused."""

    neutral: tuple[Any, ...]
    reason: str

    def accepts(self, value: Any) -> bool:
        """Whether the value changes nothing; 0 is not false."""
        return value is None or any(type(value) is type(same) and value == same for same in self.neutral)


_OFF = (False,)
_GPUS = "the starter of the processes decides it (--nproc, torchrun, srun); remove the key"
_LOADER = "encoded rows are mapped from disk, there are no loading workers; remove the key"
_OTHER_STAGE = "it belongs to a stage other than sft; remove the key"
_MODEL_EDIT = "the model is used as its own configuration describes it"
_FREEZE = "only adapters are trained"
_FULL_PRECISION = "bf16, fp16 or neither chooses the precision"
_HUB = "results stay in output_dir"
_ATTENTION = "attention is exact and chosen for the device; remove the key"
_KERNEL = "the built-in operations are always used"

UNBUILT: dict[str, Unbuilt] = {
    # Data
    "eval_num_beams": Unbuilt((1,), "generation is greedy"),
    "buffer_size": Unbuilt((16384,), "rows are shuffled as a whole; remove the key"),
    "data_seed": Unbuilt((), "seed fixes the order of the data, too"),
    "preprocessing_batch_size": Unbuilt((1000,), "it has no meaning here; remove the key"),
    "dataloader_pin_memory": Unbuilt((False, True), _LOADER),
    "dataloader_prefetch_factor": Unbuilt((), _LOADER),
    "dataloader_drop_last": Unbuilt(_OFF, "every row is used"),
    "remove_unused_columns": Unbuilt((True,), "columns that are not needed are never read"),
    "disable_shuffling": Unbuilt(_OFF, "rows come in shuffled order"),
    "ignore_pad_token_for_loss": Unbuilt((True,), "padding never carries loss"),
    "eval_on_each_dataset": Unbuilt(_OFF, "all held-out rows are evaluated together"),
    "media_dir": Unbuilt((), "only text models are trained"),
    # Adapters
    "loraplus_lr_embedding": Unbuilt(
        (1e-6,), "adapters of embeddings share learning_rate and loraplus_lr_ratio"
    ),
    "pissa_convert": Unbuilt((False, True), "adapters are always written as plain LoRA on the original base"),
    "create_new_adapter": Unbuilt(_OFF, "every run starts a new adapter; remove the key"),
    "adapter_folder": Unbuilt((), "every run starts a new adapter"),
    "bias": Unbuilt(("none",), "biases stay frozen"),
    "task_type": Unbuilt(("CAUSAL_LM",), "only causal language models are trained"),
    "use_llama_pro": Unbuilt(_OFF, _FREEZE),
    "freeze_trainable_layers": Unbuilt((2,), _FREEZE),
    "freeze_trainable_modules": Unbuilt(("all",), _FREEZE),
    "freeze_extra_modules": Unbuilt((), _FREEZE),
    "freeze_vision_tower": Unbuilt((True,), "only text models are trained"),
    "freeze_multi_modal_projector": Unbuilt((True,), "only text models are trained"),
    "train_mm_proj_only": Unbuilt(_OFF, "only text models are trained"),
    # Quantisation
    "quantization_device_map": Unbuilt(("auto",), "the model sits on one device"),
    "bnb_4bit_quant_storage": Unbuilt(("uint8",), "packed weights are bytes"),
    "llm_int8_enable_fp32_cpu_offload": Unbuilt(_OFF, "the model sits on one device"),
    "llm_int8_has_fp16_weight": Unbuilt(_OFF, "the base is frozen, one copy of it is enough"),
    # Model
    "flash_attn": Unbuilt(("auto", "sdpa", "fa2"), _ATTENTION),
    "attn_implementation": Unbuilt(("sdpa", "flash_attention_2"), _ATTENTION),
    "rope_scaling": Unbuilt((), _MODEL_EDIT),
    "shift_attn": Unbuilt(_OFF, _MODEL_EDIT),
    "resize_vocab": Unbuilt(_OFF, _MODEL_EDIT),
    "add_tokens": Unbuilt((), _MODEL_EDIT),
    "add_special_tokens": Unbuilt((), _MODEL_EDIT),
    "new_special_tokens": Unbuilt((), _MODEL_EDIT),
    "split_special_tokens": Unbuilt(_OFF, "special tokens are never split"),
    "use_fast_tokenizer": Unbuilt((True,), "tokenizers are always the fast ones"),
    "tokenizer_name_or_path": Unbuilt((), "the model's own tokenizer is used"),
    "cache_dir": Unbuilt((), "set the environment variable HF_HOME"),
    "hf_hub_token": Unbuilt((), "set the environment variable HF_TOKEN, keep tokens out of files"),
    "device_map": Unbuilt(("auto",), "the model sits on one device"),
    "torch_dtype": Unbuilt(("auto",), _FULL_PRECISION),
    "infer_dtype": Unbuilt(("auto",), _FULL_PRECISION),
    "low_cpu_mem_usage": Unbuilt((True,), "the model is always loaded sparingly"),
    "use_cache": Unbuilt((True,), "generation always uses its cache"),
    "moe_aux_loss_coef": Unbuilt((), _MODEL_EDIT),
    "mixture_of_depths": Unbuilt((), _MODEL_EDIT),
    "use_unsloth": Unbuilt(_OFF, _KERNEL),
    "use_unsloth_gc": Unbuilt(_OFF, "write gradient_checkpointing: true"),
    "use_reentrant_gc": Unbuilt((False, True), "gradient_checkpointing has one form; remove the key"),
    "gradient_checkpointing_kwargs": Unbuilt((), "gradient_checkpointing has one form; remove the key"),
    "upcast_layernorm": Unbuilt(_OFF, _FULL_PRECISION),
    "upcast_lmhead_output": Unbuilt(_OFF, _FULL_PRECISION),
    # Training
    "pure_bf16": Unbuilt(_OFF, "write bf16: true; adapters stay in fp32"),
    "tf32": Unbuilt(_OFF, _FULL_PRECISION),
    "half_precision_backend": Unbuilt(("auto",), _FULL_PRECISION),
    "neftune_noise_alpha": Unbuilt((0, 0.0), "no noise is added to embeddings"),
    "label_smoothing_factor": Unbuilt((0, 0.0), "the loss is plain cross-entropy"),
    "use_galore": Unbuilt(_OFF, "it is not among the optimizers of optim"),
    "use_apollo": Unbuilt(_OFF, "it is not among the optimizers of optim"),
    "use_badam": Unbuilt(_OFF, "it is not among the optimizers of optim"),
    "use_adam_mini": Unbuilt(_OFF, "it is not among the optimizers of optim"),
    "use_muon": Unbuilt(_OFF, "it is not among the optimizers of optim"),
    "use_dft_loss": Unbuilt(_OFF, "the loss is plain cross-entropy"),
    "full_determinism": Unbuilt(_OFF, "seed fixes everything that is random"),
    "fsdp_config": Unbuilt(({},), "fsdp: true shares out whole transformer blocks; remove the key"),
    "ddp_backend": Unbuilt((), _GPUS),
    "ddp_find_unused_parameters": Unbuilt(_OFF, _GPUS),
    "local_rank": Unbuilt((-1, 0), _GPUS),
    "ray_run_name": Unbuilt((), _GPUS),
    "ray_num_workers": Unbuilt((1,), _GPUS),
    "use_cpu": Unbuilt((), "the device is found; hide a GPU with CUDA_VISIBLE_DEVICES="),
    # Stages
    "pref_beta": Unbuilt((0.1,), _OTHER_STAGE),
    "pref_ftx": Unbuilt((0, 0.0), _OTHER_STAGE),
    "pref_loss": Unbuilt(("sigmoid",), _OTHER_STAGE),
    "simpo_gamma": Unbuilt((0.5,), _OTHER_STAGE),
    "kto_chosen_weight": Unbuilt((1, 1.0), _OTHER_STAGE),
    "kto_rejected_weight": Unbuilt((1, 1.0), _OTHER_STAGE),
    "dpo_label_smoothing": Unbuilt((0, 0.0), _OTHER_STAGE),
    "ref_model": Unbuilt((), _OTHER_STAGE),
    "reward_model": Unbuilt((), _OTHER_STAGE),
    "ranking": Unbuilt(_OFF, _OTHER_STAGE),
    "ppo_epochs": Unbuilt((4,), _OTHER_STAGE),
    # Checkpoints
    "save_only_model": Unbuilt(_OFF, "a checkpoint always holds what a run needs to go on"),
    "save_safetensors": Unbuilt((True,), "weights are always saved as safetensors"),
    # Evaluation
    "do_predict": Unbuilt(_OFF, "give eval_dataset and predict_with_generate: true"),
    "eval_accumulation_steps": Unbuilt((), "an evaluation keeps no logits; remove the key"),
    "compute_accuracy": Unbuilt(_OFF, "predict_with_generate: true measures exact match"),
    "do_sample": Unbuilt(_OFF, "generation is greedy"),
    "temperature": Unbuilt((), "generation is greedy"),
    "top_p": Unbuilt((), "generation is greedy"),
    "top_k": Unbuilt((), "generation is greedy"),
    "num_beams": Unbuilt((1,), "generation is greedy"),
    "max_length": Unbuilt((), "cutoff_len bounds a row, max_new_tokens an answer"),
    "repetition_penalty": Unbuilt((1, 1.0), "generation is greedy"),
    # Logging
    "logging_strategy": Unbuilt(("steps",), "logging_steps says when a line is logged"),
    "log_level": Unbuilt(("passive",), "the log has one level"),
    "disable_tqdm": Unbuilt(_OFF, "plain lines appear by themselves when the output is not a terminal"),
    "use_swanlab": Unbuilt(_OFF, "metrics.jsonl and report.html hold everything"),
    "include_num_input_tokens_seen": Unbuilt(_OFF, "tokens per second are always logged; remove the key"),
    "include_effective_tokens_per_second": Unbuilt(_OFF, "tokens per second are always logged; remove the key"),
    "push_to_hub": Unbuilt(_OFF, _HUB),
    "hub_model_id": Unbuilt((), _HUB),
    "export_dir": Unbuilt((), "`lorakit merge` writes a plain model folder"),
    "print_param_status": Unbuilt(_OFF, "the numbers of parameters are always logged; remove the key"),
}

# Other spellings of keys, taken as they are.
ALIASES: dict[str, str] = {
    "bnb_4bit_quant_type": "quantization_type",
    "bnb_4bit_use_double_quant": "double_quantization",
    "evaluation_strategy": "eval_strategy",
}

OTHER_NAMES: dict[str, str] = {
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "revision": "model_revision",
    "r": "lora_rank",
    "rank": "lora_rank",
    "lora_r": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target",
    "modules_to_save": "additional_target",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform",
    "adalora": "use_adalora",
    "dora": "use_dora",
    "rslora": "use_rslora",
    "target_r": "adalora_target_r",
    "lora_plus_lr_ratio": "loraplus_lr_ratio",
    "lora_target_modules": "lora_target",
    "qlora": "use_qlora",
    "bits": "quantization_bit",
    "quant_type": "quantization_type",
    "double_quant": "double_quantization",
    "data": "dataset",
    "datasets": "dataset",
    "train_dataset": "dataset",
    "train_file": "dataset",
    "validation_file": "eval_dataset",
    "test_datasets": "eval_dataset",
    "max_seq_length": "cutoff_len",
    "sample_packing": "packing",
    "cache_path": "tokenized_path",
    "max_seq_len": "cutoff_len",
    "sequence_len": "cutoff_len",
    "chat_template": "template",
    "system_prompt": "default_system",
    "excess_length_strategy": "long_rows",
    "output": "output_dir",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "scheduler": "lr_scheduler_type",
    "warmup": "warmup_ratio",
    "optimizer": "optim",
    "max_norm": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
}
