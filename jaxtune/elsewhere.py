"""The names that PEFT, Transformers, TRL, Axolotl and LLaMA-Factory have for keys of the configuration and for values.
They are for messages alone: no key has two names.
"""

# Our key, with what a reader has to know of it -> their names; with a section, those that are meant so in it alone.
_NAMES = {
    "model.path": "model_name_or_path base_model pretrained_model_name_or_path model_name model_id model.name",
    "model.revision": "model_revision revision_of_model",
    "model.tokenizer": "tokenizer_name_or_path tokenizer_name tokenizer_config",
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
    "tune.layers": "layers_to_transform lora_layers_to_transform peft_layers_to_transform",
    "tune.modules_to_save": "lora_modules_to_save additional_target",
    "tune.use_rslora": "peft_use_rslora rslora",
    "data.path": "train_file train_dataset dataset_name dataset_path data_path data_files",
    "data.sources": "datasets",
    "data.format (text for stage pt; alpaca, sharegpt and messages are of stage sft)": "stage",
    "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len seq_length model_max_length block_size",
    "data.columns.text": "dataset_text_field",
    "data.columns.messages": "field_messages",
    "data.packing": "sample_packing neat_packing",
    "data.template": "chat_template chat_template_path",
    "data.system": "default_system system_prompt",
    "data.num_samples": "max_samples max_train_samples",
    "data.train_on_prompt": "train_on_inputs",
    "data.train_roles": "roles_to_train",
    "data.train_on: last": "mask_history",
    "data.turn_end": "train_on_eos",
    "train.epochs": "num_train_epochs num_epochs",
    "train.steps": "max_steps",
    "train.batch_size (sequences of a whole step, of all devices and micro-batches)": (
        "per_device_train_batch_size micro_batch_size train_batch_size global_batch_size"
    ),
    "train.micro_batches (into how many parts train.batch_size is cut)": "gradient_accumulation_steps",
    "optim.name": "optimizer optimizer_name optim",
    "optim.lr": "learning_rate",
    "optim.schedule": "lr_scheduler_type lr_scheduler",
    "optim.warmup": "warmup_ratio warmup_steps num_warmup_steps",
    "optim.min_lr": "min_lr_ratio cosine_min_lr_ratio min_lr_rate",
    "optim.weight_decay": "wd adam_weight_decay",
    "optim.beta1 and optim.beta2": "betas adam_betas",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_epsilon epsilon",
    "optim.clip_norm": "max_grad_norm gradient_clipping grad_clip gradient_clip_val",
    "mesh.data": "dp",
    "mesh.tensor": "tensor_parallel_size tp",
    "mesh.context": "context_parallel_size cp",
    "mesh.pipe": "pipeline_parallel_size pp",
    "memory.remat: block": "gradient_checkpointing",
    "memory.attention": "attn_implementation flash_attn flash_attention",
    "precision.params": "torch_dtype dtype",
    "precision.params: bfloat16": "pure_bf16",
    "precision.compute: bfloat16": "bf16",
    "precision.compute: float16": "fp16",
    "precision.matmul: float8": "fp8",
    "checkpoint.every": "save_steps checkpoint.steps",
    "checkpoint.keep": "save_total_limit",
    "checkpoint.resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "eval.every": "eval_steps eval.steps",
    "eval.fraction": "val_size val_set_size",
    "eval.path": "eval_dataset validation_file test_datasets",
    "log.every": "logging_steps log.steps",
    "log.tensorboard": "report_to",
}
ELSEWHERE = {name: ours for ours, names in _NAMES.items() for name in names.split()}

# Names that no key of ours is meant by -> why.
_BATCHES = "held-out data comes in batches of train.batch_size"
NOWHERE = {
    "eval.batch_size": _BATCHES,
    "eval_batch_size": _BATCHES,
    "per_device_eval_batch_size": _BATCHES,
    "log.level": "how much is printed cannot be chosen",
    "overwrite_output_dir": (
        "no run is written over: the same train.output_dir goes on with the one in it (checkpoint.resume), and another "
        "begins a new one"
    ),
}

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
