"""Levanter: its Trainer on its own Qwen2, with its LoRA, its loader of Hugging Face directories and its packer.

usage: levanter.py SPEC.json

What its main/sft.py does to the rows, and what its main/lora_lm.py does to the model: there is no program of its own
for both. The loss is on all that follows a row's first supervised token. Layers are rematerialised, as is its default.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the names of the scripts here would hide packages

from tools.bench_peers.common import Compiled, Meter, Spec, jax_peak_gb  # noqa: E402


def main() -> None:
    import time

    spec = Spec.read(sys.argv[1])
    meter, compiled = Meter(spec.warm), Compiled()

    import jax
    from levanter.models.lm_model import compute_next_token_loss
    from levanter.optim import AdamConfig
    from levanter.trainer import Trainer

    config = trainer_config(spec)
    config.initialize()
    optimizer = AdamConfig(learning_rate=1e-4).build(config.num_train_steps)
    with Trainer(config, optimizer, loss_fn=compute_next_token_loss) as trainer:
        model, trained = load(spec, trainer)
        state = trainer.initial_state(jax.random.key(0), model=model, is_trainable=trained)
        meter.loaded = time.time()

        def note(step) -> None:
            """The loss is on the host by then. After the last step, hooks run once more."""
            if len(meter.ends) < config.num_train_steps:
                meter.ends.append(time.time())
                meter.losses.append(float(step.loss))

        trainer.add_hook(note, every=1)
        trainer.train(state, batches(spec, meter, model.Pos, trainer.TrainBatch))
    peak = jax_peak_gb(spec.device)
    print("\n" + meter.answer(peak, compiled.seconds))


def trainer_config(spec: Spec):
    import tempfile

    import jmp
    from levanter.checkpoint import CheckpointerConfig
    from levanter.distributed import RayConfig
    from levanter.tracker import NoopConfig
    from levanter.trainer import TrainerConfig

    scratch = Path(tempfile.mkdtemp(prefix="bench-"))
    return TrainerConfig(
        mp=jmp.get_policy(f"p=f32,c={spec.dtype}"),
        tracker=NoopConfig(),
        log_dir=scratch,
        log_jaxprs=False,
        log_xla_hlo=False,
        train_batch_size=spec.batch,
        num_train_steps=spec.warm + spec.steps,
        checkpointer=CheckpointerConfig(base_path=str(scratch)),
        ray=RayConfig(auto_start_cluster=False),
        require_accelerator=False,
    )


def load(spec: Spec, trainer):
    """(model, which of its parts train)."""
    import dataclasses
    import json

    import haliax
    import jax
    from levanter.lora import LoraConfig, lora_trainable_params_filter, loraize
    from levanter.models.qwen import QwenConfig
    from transformers import Qwen2Config

    found = json.loads((Path(spec.model) / "config.json").read_text())
    config = QwenConfig.from_hf_config(Qwen2Config(**found, no_bias=True))  # it reads a field that Qwen2's have not
    config = dataclasses.replace(config, seq_len=spec.length)
    converter = config.hf_checkpoint_converter(for_transformers_4(spec.model))
    places = trainer.parameter_axis_mapping
    options = {"axis_mapping": places, "dtype": trainer.mp.param_dtype, "resize_vocab_to_match_tokenizer": False}
    model = converter.load_pretrained(config.model_type, config=config, **options)
    if spec.method == "full":
        return model, True
    lora = LoraConfig(spec.lora["targets"], spec.lora["rank"], spec.lora["alpha"], spec.lora["dropout"])
    add = haliax.named_jit(lambda model, key: loraize(model, lora, key=key), axis_resources=places)
    model = add(model, jax.random.key(1))
    return model, lora_trainable_params_filter(model)


def for_transformers_4(model: str) -> str:
    """The model's directory again, less the tokenizer's list of special tokens, which only Transformers 5 can read."""
    import json
    import tempfile

    copy = Path(tempfile.mkdtemp(prefix="bench-"))
    for file in Path(model).iterdir():
        (copy / file.name).symlink_to(file)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens", None)
    (copy / "tokenizer_config.json").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(copy)


def batches(spec: Spec, meter: Meter, positions, batch):
    """Packed rows, counted. Rows are taken again from the first when there are no more."""
    import itertools

    import jax
    import numpy as np
    from levanter.data.loader import stack_batches
    from levanter.data.packing import PromptCompletion, pack_prompt_completions

    cut = [(row["input_ids"][: spec.length], row["supervised"][: spec.length]) for row in spec.read_rows()]
    rows = [PromptCompletion(ids, supervised.index(1)) for ids, supervised in cut if 1 in supervised]
    packs = pack_prompt_completions(positions, itertools.cycle(rows), pad_token=PAD)
    for stacked in stack_batches(packs, positions, batch):
        segments = np.asarray(jax.tree.leaves(stacked.attn_mask.segment_ids)[0])
        meter.counts.append((int((segments >= 0).sum()), int(stacked.loss_mask.array.sum())))
        yield stacked


PAD = 151643  # Qwen2.5's <|endoftext|>

if __name__ == "__main__":
    main()
