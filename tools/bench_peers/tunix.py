"""Tunix: its PeftTrainer on its own Qwen2, LoRA by Qwix, the weights by its loader of safetensors.

usage: tunix.py SPEC.json

Its trainer refuses packing ("not supported in SFT PeftTrainer yet"), so rows are padded. Steps are not dispatched
ahead, so that the end of each can be seen.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the names of the scripts here would hide packages

from tools.bench_peers.common import Compiled, Meter, Spec, jax_peak_gb  # noqa: E402


def main() -> None:
    import time

    import optax
    from tunix.sft import peft_trainer, utils

    from tools.bench_peers.padded import batches

    spec = Spec.read(sys.argv[1])
    meter, compiled = Meter(spec.warm), Compiled()
    model = load(spec)
    meter.loaded = time.time()
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**6, max_inflight_computations=1)
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-4), config)
    trainer.with_training_hooks(clock(meter))
    trainer.with_gen_model_input_fn(
        lambda batch: {
            "input_tokens": batch["input_ids"],
            "input_mask": batch["supervised"],
            "positions": utils.build_positions_from_mask(batch["real"]),
            "attention_mask": utils.make_causal_attn_mask(batch["real"] == 1),
        }
    )
    trainer.train(batches(spec, meter))
    peak = jax_peak_gb(spec.device)
    print("\n" + meter.answer(peak, compiled.seconds))


def load(spec: Spec):
    """Tunix's Qwen2 with the directory's weights, and with LoRA where the method asks for it."""
    import jax.numpy as jnp
    import qwix
    from flax import nnx
    from tunix.models.qwen2.params import create_model_from_safe_tensors

    dtype = jnp.dtype(spec.dtype)
    model = create_model_from_safe_tensors(spec.model, model_config(spec.model, dtype), dtype=dtype)
    if spec.method == "full":
        return model
    targets = "|".join(spec.lora["targets"])
    provider = qwix.LoraProvider(
        module_path=f".*({targets})",
        rank=spec.lora["rank"],
        alpha=spec.lora["alpha"],
        dropout=spec.lora["dropout"],
    )
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())
    model.set_attributes(qwix_rngs=nnx.Rngs(dropout=1))  # else dropout finds no keys
    return model


def model_config(directory: str, dtype):
    import json

    from tunix.models.qwen2.model import ModelConfig

    found = json.loads((Path(directory) / "config.json").read_text())
    return ModelConfig(
        num_layers=found["num_hidden_layers"],
        vocab_size=found["vocab_size"],
        embed_dim=found["hidden_size"],
        hidden_dim=found["intermediate_size"],
        num_heads=found["num_attention_heads"],
        head_dim=found["hidden_size"] // found["num_attention_heads"],
        num_kv_heads=found["num_key_value_heads"],
        rope_theta=found["rope_theta"],
        norm_eps=found["rms_norm_eps"],
        use_tied_embedding=found["tie_word_embeddings"],
        dtype=dtype,
        param_dtype=dtype,
    )


def clock(meter: Meter):
    """Hooks that note when steps end: a step begins when the one before it is done."""
    import time

    from tunix.sft.hooks import TrainingHooks

    class Clock(TrainingHooks):
        begun = 0

        def on_train_step_start(self, train_ctx) -> None:
            if self.begun:
                meter.ends.append(time.time())
            self.begun += 1

        def on_train_step_end(self, train_ctx, train_step, train_loss) -> None:
            meter.losses.append(float(train_loss))

        def on_train_end(self, train_ctx) -> None:
            meter.ends.append(time.time())

        def on_train_start(self, train_ctx) -> None:
            """Nothing to note."""

        def on_eval_step_start(self, train_ctx) -> None:
            """Nothing to note."""

        def on_eval_step_end(self, train_ctx, eval_loss) -> None:
            """Nothing to note."""

    return Clock()


if __name__ == "__main__":
    main()
