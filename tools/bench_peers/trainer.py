"""Transformers' Trainer with PEFT.

usage: trainer.py SPEC.json [--liger] [--compile]

It does not pack: of conversations it takes one at a time and accumulates two; of blocks, a whole batch at once.
"""

import math
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the names of the scripts here would hide packages

from tools.bench_peers.common import Spec  # noqa: E402

ACCUMULATE = 2  # conversations of a step


def main() -> None:
    import time

    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from tools.bench_peers import torch_side

    spec = Spec.read(sys.argv[1])
    meter = torch_side.begin(spec)
    model, tokenizer = torch_side.load(spec)
    if spec.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=spec.checkpointing)
    if adapter := torch_side.lora(spec):
        model = get_peft_model(model, adapter)
    meter.loaded = time.time()
    rows = spec.read_rows()
    batch, accumulate = (spec.batch, 1) if spec.blocks else (1, ACCUMULATE)
    timed = num_steps(spec, rows, batch * accumulate)
    rows = rows[: len(rows) // accumulate * accumulate]  # so that no step is short
    clock = torch_side.Clock(meter, accumulate)
    arguments = torch_side.arguments(spec, spec.warm + timed, batch, accumulate)
    arguments |= {"use_liger_kernel": "--liger" in sys.argv, "torch_compile": "--compile" in sys.argv}
    Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=torch_side.with_labels(rows),
        data_collator=clock.counted(DataCollatorForSeq2Seq(tokenizer, padding=True)),
        callbacks=[clock],
    ).train()
    compiling = meter.first_over_later() if "--compile" in sys.argv else None
    print("\n" + meter.answer(torch_side.peak_gb(spec), compiling))


def num_steps(spec: Spec, rows: list[dict], rows_of_step: int) -> int:
    """As many as have about the tokens that the other sides are timed on."""
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    return math.ceil(spec.steps * spec.batch * spec.length / (rows_of_step * mean))


if __name__ == "__main__":
    main()
