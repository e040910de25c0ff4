"""Base models with LoRA adapters: checked, loaded, trained and run forward.

In: settings and encoded examples. Out: models, adapters, checkpoints, losses.
May import: `data` and what is beneath it.
"""

PUBLIC = {
    "adapters": ("save_adapter",),
    "batch_size": (
        "find_batch_tokens",
        "is_out_of_memory",
        "probe",
        "start_tokens",
        "within_memory",
    ),
    "batches": (
        "Batch",
        "MAX_EXAMPLES",
        "device_of",
        "lengths_of",
        "make_batches",
        "plan_batches",
        "prefetch",
        "to_device",
    ),
    "cache": ("ModelCache",),
    "checkpoints": ("read_checkpoints",),
    "devices": ("use_device",),
    "files": ("load_tokenizer", "refuse_pickled_weights", "translate_load_errors"),
    "forward": ("run_forward",),
    "fused": ("fused_elementwise",),
    "identity": ("identity",),
    "loading": ("load_encoder",),
    "lora": ("LoraPair", "lora_pairs"),
    "losses": ("label_logits", "token_losses"),
    "micro_batches": ("first_tokens",),
    "parameters": ("adapter_parameters", "multiplied_parameters"),
    "training": ("steps_per_epoch", "train"),
    "warmup": ("warm_up",),
}
