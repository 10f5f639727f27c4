"""What the torch sides have in common: the model, the arguments of Transformers' trainers, and the clock in them."""

import importlib.util
import os
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from tools.bench_peers.common import Meter, Spec, host_peak_gb


class Clock(TrainerCallback):
    """Notes the end of every step and, as a collator, the tokens of every batch."""

    def __init__(self, meter: Meter, accumulate: int = 1):
        self.meter, self.accumulate = meter, accumulate
        self._micro: list[tuple[int, int]] = []

    def on_step_end(self, *_, **__) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.meter.ends.append(time.time())

    def on_log(self, _arguments, _state, _control, logs: dict, **_) -> None:
        if "loss" in logs:
            self.meter.losses.append(float(logs["loss"]))

    def counted(self, collate: Any) -> Any:
        """The collator with its batches counted. Transformers' loss is on labels[1:]."""

        def collated(rows: list[dict]) -> dict:
            batch = collate(rows)
            supervised = int((batch["labels"][:, 1:] != -100).sum())
            self._micro.append((sum(len(row["input_ids"]) for row in rows), supervised))
            if len(self._micro) == self.accumulate:
                self.meter.counts.append(tuple(map(sum, zip(*self._micro))))
                self._micro = []
            return batch

        return collated


def begin(spec: Spec) -> Meter:
    """Use what the machine has: every core that this process may run on, or the GPU."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    if spec.device == "gpu" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU")
    return Meter(spec.warm)


def load(spec: Spec) -> tuple[Any, Any]:
    """(model, tokenizer). Full tuning keeps float32 weights; a frozen base is in the type that is computed in."""
    dtype = torch.float32 if spec.method == "full" else getattr(torch, spec.dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if spec.device == "gpu" and importlib.util.find_spec("flash_attn"):
        options["attn_implementation"] = "flash_attention_2"
    if spec.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if spec.device == "gpu":
        options["device_map"] = {"": 0}
    return AutoModelForCausalLM.from_pretrained(spec.model, **options), AutoTokenizer.from_pretrained(spec.model)


def lora(spec: Spec) -> LoraConfig | None:
    if spec.method == "full":
        return None
    options = {name: spec.lora[name] for name in ("alpha", "dropout")}
    return LoraConfig(
        r=spec.lora["rank"],
        target_modules=spec.lora["targets"],
        task_type="CAUSAL_LM",
        **{f"lora_{name}": value for name, value in options.items()},
    )


def arguments(spec: Spec, steps: int, batch: int, accumulate: int = 1) -> dict[str, Any]:
    """Of a TrainingArguments or SFTConfig. steps: all, the warm ones too."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="bench-"),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": spec.checkpointing,
        "use_cpu": spec.device == "cpu",
        "bf16": spec.dtype == "bfloat16",
    }


def with_labels(rows: list[dict]) -> list[dict]:
    """Rows as Transformers and TRL take them."""
    return [
        {
            "input_ids": row["input_ids"],
            "labels": [t if s else -100 for t, s in zip(row["input_ids"], row["supervised"])],
        }
        for row in rows
    ]


def peak_gb(spec: Spec) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if spec.device == "gpu" else host_peak_gb()
