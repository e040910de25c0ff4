"""Base models with LoRA adapters: checked, loaded, trained and run forward.

In: settings and encoded examples. Out: models, adapters, checkpoints, losses.
May import: `data` and what is beneath it.
"""

PUBLIC = {
    "adapters": ("save_adapter",),
    "batch_size": (
        "FEW_TOKENS",
        "find_batch_tokens",
        "fits",
        "is_out_of_memory",
        "run_worst",
        "start_tokens",
        "within_memory",
    ),
    "batches": (
        "Batch",
        "device_of",
        "group_examples",
        "lengths_of",
        "make_batches",
        "positions_of",
        "prefetch",
        "to_device",
    ),
    "cache": ("ModelCache",),
    "checkpoints": ("read_checkpoints",),
    "devices": ("local_processes", "use_device"),
    "files": ("load_tokenizer", "refuse_pickled_weights", "translate_load_errors"),
    "forward": ("run_forward",),
    "fused": ("fused_elementwise",),
    "identity": ("identity",),
    "loading": ("load_encoder",),
    "kernels": ("precision_of",),
    "last_layer": ("labelled_alone", "modules_after_attention"),
    "lora": ("LoraPair", "adapted_layers", "lora_pairs", "scaling"),
    "losses": ("label_logits", "token_losses"),
    "micro_batches": ("first_tokens",),
    "parameters": ("adapter_parameters", "multiplied_parameters"),
    "tracking": ("Trackers", "as_folder_name"),
    "training": ("steps_per_epoch", "train"),
    "warmup": ("warm_up",),
}
