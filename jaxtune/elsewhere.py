"""The names that PEFT, Transformers, TRL, Axolotl, LLaMA-Factory, Megatron-LM and DeepSpeed have for keys of the
configuration and for values. They are for messages alone: no key has two names.
"""

# Our key, with what a reader has to know of it -> their names; with a section, those that are meant so in it alone.
_NAMES = {
    "model.path": "model_name_or_path base_model pretrained_model_name_or_path model_name model_id model.name",
    "model.revision": "model_revision revision_of_model",
    "model.tokenizer": "tokenizer_name_or_path tokenizer_name tokenizer_config tokenizer_type tokenizer_model",
    "model.quantize": "quantization_bit bnb_4bit_quant_type",
    "model.quantize: nf4": "load_in_4bit",
    "model.quantize: int8": "load_in_8bit",
    "model.double_quant": "bnb_4bit_use_double_quant double_quantization",
    "tune.method": "finetuning_type peft_type",
    "tune.method: dora": "use_dora peft_use_dora",
    "tune.method: pissa": "pissa_init",
    "tune.init (pissa and loftq are values of tune.method)": "init_lora_weights peft_init_lora_weights",
    "tune.freeze_first or tune.freeze_last (how many layers do not train)": "freeze_trainable_layers",
    "tune.adapter": "adapter_name_or_path lora_model_dir",
    "tune.rank": "r lora_r lora_rank",
    "tune.alpha": "lora_alpha",
    "tune.dropout": "lora_dropout",
    "tune.targets": "target_modules lora_target_modules lora_target",
    "tune.targets: all-linear": "lora_target_linear",
    "tune.exclude": "exclude_modules",
    "tune.bias": "lora_bias",
    "tune.layers": "layers_to_transform lora_layers_to_transform peft_layers_to_transform",
    "tune.train_patterns": "unfrozen_parameters",
    "tune.new_tokens": "add_tokens new_special_tokens",
    "tune.token_indices": "trainable_token_indices",
    "tune.modules_to_save": "lora_modules_to_save additional_target",
    "tune.use_rslora": "peft_use_rslora rslora",
    "data.path": "train_file train_dataset dataset_name dataset_path data_path data_files",
    "data.sources": "datasets",
    "data.format (text for stage pt; alpaca, sharegpt and messages are of stage sft)": "stage",
    "data.format": "data.type",
    "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len seq_length model_max_length block_size",
    "data.columns.text": "dataset_text_field",
    "data.columns.messages": "field_messages",
    "data.shuffle": "shuffle_dataset shuffle_merged_datasets",
    "data.shuffle_buffer": "buffer_size",
    "data.too_long": "excess_length_strategy truncation_mode",
    "data.cache": "dataset_prepared_path tokenized_path",
    "data.packing": "sample_packing neat_packing",
    "data.template": "chat_template chat_template_path",
    "data.system": "default_system system_prompt",
    "data.num_samples": "max_samples max_train_samples",
    "data.train_on_prompt": "train_on_inputs",
    "data.train_on_prompt: false": "completion_only_loss assistant_only_loss",
    "data.train_roles": "roles_to_train",
    "data.train_on: last": "mask_history",
    "data.turn_end": "train_on_eos",
    "train.epochs": "num_train_epochs num_epochs",
    "train.steps": "max_steps train_iters",
    "train.batch_size (sequences of a whole step, of all devices and micro-batches)": (
        "per_device_train_batch_size micro_batch_size train_batch_size global_batch_size train_micro_batch_size_per_gpu"
    ),
    "train.micro_batches (into how many parts train.batch_size is cut)": "gradient_accumulation_steps",
    "optim.name": "optimizer optimizer_name optim",
    "optim.lr": "learning_rate",
    "optim.schedule": "lr_scheduler_type lr_scheduler lr_decay_style",
    "optim.warmup": "warmup_ratio warmup_steps num_warmup_steps lr_warmup_iters lr_warmup_fraction",
    "optim.min_lr": "min_lr_ratio cosine_min_lr_ratio min_lr_rate",
    "optim.weight_decay": "wd adam_weight_decay",
    "optim.beta1 and optim.beta2": "betas adam_betas",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_epsilon epsilon adam_eps",
    "optim.clip_norm": "max_grad_norm gradient_clipping grad_clip gradient_clip_val clip_grad",
    "mesh.data": "dp",
    "mesh.tensor": "tensor_parallel_size tp tensor_model_parallel_size",
    "mesh.context": "context_parallel_size cp sequence_parallel_degree",
    "mesh.virtual_stages (with mesh.schedule: interleaved)": "num_layers_per_virtual_pipeline_stage",
    "mesh.zero": "zero_stage zero_optimization use_distributed_optimizer",
    "mesh.pipe": "pipeline_parallel_size pp pipeline_model_parallel_size",
    "memory.remat: none": "disable_gradient_checkpointing",
    "memory.remat: block": "gradient_checkpointing recompute_granularity recompute_method activation_checkpointing",
    "memory.offload: [optimizer]": "offload_optimizer",
    "memory.offload: [params]": "offload_param",
    "memory.offload: [activations]": "activation_offloading",
    "memory.attention": (
        "attn_implementation flash_attn flash_attention use_flash_attn sdp_attention xformers_attention"
    ),
    "precision.params": "torch_dtype dtype",
    "precision.params: bfloat16": "pure_bf16",
    "precision.compute: bfloat16": "bf16",
    "precision.compute: float16": "fp16",
    "precision.matmul: float8": "fp8",
    "precision.loss_scale.initial": "initial_loss_scale initial_scale_power",
    "precision.loss_scale.window": "loss_scale_window",
    "checkpoint.every": "save_steps checkpoint.steps save_interval",
    "checkpoint.keep": "save_total_limit",
    "checkpoint.resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "eval.every": "eval_steps eval.steps eval_interval",
    "eval.fraction": "val_size val_set_size",
    "eval.path": "eval_dataset validation_file test_datasets",
    "log.every": "logging_steps log.steps log_interval steps_per_print",
    "log.tensorboard": "report_to",
}
ELSEWHERE = {name: ours for ours, names in _NAMES.items() for name in names.split()}

# Names that no key of ours is meant by -> why.
_REASONS = {
    "held-out data comes in batches of train.batch_size": "eval.batch_size eval_batch_size per_device_eval_batch_size",
    "how much is printed cannot be chosen": "log.level log_level disable_tqdm",
    "no run is written over: the same train.output_dir goes on with the one in it (checkpoint.resume), and another "
    "begins a new one": "overwrite_output_dir",
    "counted in steps alone, by checkpoint.every, eval.every and log.every": (
        "save_strategy eval_strategy evaluation_strategy logging_strategy saves_per_epoch evals_per_epoch"
    ),
    "what it would say is in the sections mesh (what is split), memory and precision": "deepspeed fsdp_config",
    "steps are always compiled, and what can be fused is": (
        "use_unsloth use_liger_kernel enable_liger_kernel liger_kernel_config torch_compile plugins"
    ),
    "no code is run that a model brings along; what is trained are jaxtune's own models": "trust_remote_code",
    "of a run there are metrics.jsonl and TensorBoard's events (log.tensorboard)": (
        "run_name wandb_project wandb_entity wandb_name plot_loss"
    ),
    "nothing is uploaded; what a run writes are the hub's own formats": "push_to_hub hub_model_id hub_token",
    "a run ends after its steps, with the weights of the last; what evaluations found is in metrics.jsonl": (
        "early_stopping_patience load_best_model_at_end metric_for_best_model"
    ),
    "what is done is the command's to say, as in jaxtune train": "do_train do_eval do_predict",
    "rows are tokenised by all cores and kept, and once more where anything changes that their tokens depend on": (
        "overwrite_cache preprocessing_num_workers dataset_num_proc dataset_processes dataloader_num_workers"
    ),
    "held-out data is packed as data.packing says": "eval_packing eval_sample_packing",
    "special tokens are those in the tokenizer's files; model.tokenizer names another tokenizer": "special_tokens",
    "rows are filled with several conversations by data.packing": "group_by_length",
}
NOWHERE = {name: why for why, names in _REASONS.items() for name in names.split()}

# Their values, of whatever key -> what to write.
VALUES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "paged_adamw_32bit": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
    "constant_with_warmup": "constant with optim.warmup",
    "cosine_with_min_lr": "cosine with optim.min_lr",
    "warmup_stable_decay": "wsd",
    "openai": "messages",
    "chatml": "messages",
    "completion": "text",
}

# Of tuning methods: their name -> what to write.
METHOD_NAMES = {
    "qlora": "lora with model.quantize: nf4",
    "qdora": "dora with model.quantize: nf4",
    "rslora": "lora with tune.use_rslora: true",
    "lora+": "lora with tune.loraplus_lr_ratio",
    "loraplus": "lora with tune.loraplus_lr_ratio",
    "prompt_tuning": "prompt",
    "prefix_tuning": "prefix",
    "fft": "full",
}
