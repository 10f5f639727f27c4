"""TRL's SFTTrainer with packing (its default: best fit, without padding) and PEFT.

usage: trl_packed.py SPEC.json [--liger]
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the names of the scripts here would hide packages

from tools.bench_peers.common import Spec  # noqa: E402


def main() -> None:
    import time

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tools.bench_peers import torch_side

    spec = Spec.read(sys.argv[1])
    meter = torch_side.begin(spec)
    model, tokenizer = torch_side.load(spec)
    meter.loaded = time.time()
    clock = torch_side.Clock(meter)
    arguments = torch_side.arguments(spec, spec.warm + spec.steps, spec.batch)
    arguments |= {"packing": True, "max_length": spec.length, "use_liger_kernel": "--liger" in sys.argv}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(torch_side.with_labels(spec.read_rows())),
        peft_config=torch_side.lora(spec),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.data_collator = clock.counted(trainer.data_collator)
    trainer.train()
    print("\n" + meter.answer(torch_side.peak_gb(spec)))


if __name__ == "__main__":
    main()
