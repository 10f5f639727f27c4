"""EasyDeL: its SFTTrainer on its own Qwen2, with its LoRA and its loader of Hugging Face directories.

usage: easydel.py SPEC.json

Its packer drops the mask of what is supervised, so rows are padded, and what is not supervised is labelled -100. No
attention mask comes with them: padding on the right needs none, and with one the loss, still of the supervised tokens
alone, is divided by the number of all real ones. Its LoRA has no alpha, hence a scale of 1, and no dropout.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the names of the scripts here would hide packages

from tools.bench_peers.common import Compiled, Meter, Spec, jax_peak_gb  # noqa: E402


def main() -> None:
    import tempfile
    import time

    spec = Spec.read(sys.argv[1])
    meter, compiled = Meter(spec.warm), Compiled()
    model = load(spec)
    meter.loaded = time.time()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        trainer(spec, meter, model, scratch).train()
    if len(meter.ends) < len(meter.counts):
        raise RuntimeError(f"its trainer ended after {len(meter.ends)} of {len(meter.counts)} steps; its log says why")
    peak = jax_peak_gb(spec.device)
    print("\n" + meter.answer(peak, compiled.seconds))


def load(spec: Spec):
    """EasyDeL's model with the directory's weights, and with LoRA where the method asks for it."""
    import easydel
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_compilation_cache", False)  # it keeps one in the home directory
    if spec.method == "qlora":
        raise ValueError("method qlora: weights are not quantised here; take cases of lora or full")
    dtype = jnp.dtype(spec.dtype)
    model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        spec.model,
        dtype=dtype,
        param_dtype=dtype,
        torch_load_mode="streaming",  # else by way of torch's model, rounded to float16
    )
    if spec.method == "full":
        return model
    return model.apply_lora_to_layers(spec.lora["rank"], "|".join(spec.lora["targets"]))


def trainer(spec: Spec, meter: Meter, model, scratch: str):
    """The trainer, which notes when steps end; it waits for each. scratch: its directory, where nothing is kept."""
    import time

    import easydel
    from datasets import Dataset
    from transformers import AutoTokenizer

    class Clocked(easydel.SFTTrainer):
        def on_step_end(self, state, metrics, step):
            meter.losses.append(float(metrics.loss))  # which is there when the step is done
            meter.ends.append(time.time())
            return state, metrics

    steps = list(batches(spec, meter))
    size, width = steps[0]["input_ids"].shape
    settings = easydel.SFTConfig(
        learning_rate=1e-4,
        total_batch_size=size,
        max_length=width,
        num_train_epochs=1,
        shuffle_train_dataset=False,
        resume_if_possible=False,
        do_last_save=False,
        use_wandb=False,
        save_directory=scratch,
    )
    rows = Dataset.from_dict({name: [row for step in steps for row in step[name]] for name in steps[0]})
    return Clocked(settings, AutoTokenizer.from_pretrained(spec.model), model=model, train_dataset=rows)


def batches(spec: Spec, meter: Meter) -> Iterator[dict]:
    """Padded rows as EasyDeL names them, a step at a time; the trainer takes them in this order."""
    import numpy as np

    from tools.bench_peers import padded

    for batch in padded.batches(spec, meter):
        yield {
            "input_ids": batch["input_ids"],
            "labels": np.where(batch["supervised"] == 1, batch["input_ids"], -100),
        }


if __name__ == "__main__":
    main()
