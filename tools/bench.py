#!/usr/bin/env python3
"""Real tokens per second of jaxtune and of Transformers' Trainer with PEFT, on the same conversations.

usage: bench.py [--data FILE] [--format alpaca|messages] [--tokenizer DIR] [--rounds N] [--steps N] [--json FILE]

Both fine-tune random weights of Qwen2.5-0.5B's shape with LoRA (r=8, q_proj and v_proj, dropout 0.1) in float32,
each in a process of its own, in turns, so that the machine's noise falls on both. A real token is one that is not
padding. The Trainer takes a conversation at a time and accumulates two; jaxtune packs 384 tokens and takes two.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HOME = REPOSITORY / ".cache" / "bench"
sys.path.insert(0, str(REPOSITORY))
SHAPE = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "hidden_act": "silu",
}
LENGTH, ROWS, WARM = 384, 2, 2  # tokens of a pack, rows of a step, steps before the clock starts
LORA = {"method": "lora", "rank": 8, "alpha": 32, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}


def main() -> None:
    options = parse()
    HOME.mkdir(parents=True, exist_ok=True)
    config = HOME / "config.json"
    config.write_text(json.dumps(configuration(options)))
    if not (HOME / "model" / "config.json").exists():
        run_self("make-model", options.tokenizer or demo_model())
    run_self("make-rows", config)
    results: dict[str, list[dict]] = {"jaxtune": [], "trainer": []}
    for number in range(options.rounds):
        for side in sorted(results, reverse=bool(number % 2)):
            results[side].append(run_self(side, config, options.steps))
            print(f"round {number + 1}  {side:8} {results[side][-1]}", flush=True)
    summary = summarise(results)
    print_table(summary)
    if options.json:
        options.json.write_text(json.dumps({"rounds": results, "summary": summary}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY / "demo" / "persona.jsonl")
    parser.add_argument("--format", choices=["alpaca", "messages"], default="messages")
    parser.add_argument("--system", help="first message of every conversation")
    parser.add_argument("--tokenizer", help="directory or .gguf; the demo model's, when left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    return parser.parse_args()


def configuration(options: argparse.Namespace) -> dict:
    data = {"path": str(options.data), "format": options.format, "system": options.system, "max_length": LENGTH}
    return {
        "model": {"path": str(HOME / "model")},
        "tune": LORA,
        "data": data,
        "train": {"output_dir": str(HOME / "run"), "batch_size": ROWS},
        "mesh": {"fsdp": 1},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 100000},
    }


def run_self(part: str, *arguments) -> dict:
    """A part of the benchmark in a process of its own; what it printed last, as JSON."""
    command = [sys.executable, __file__, "--part", part, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{part} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def demo_model() -> str:
    done = subprocess.run([sys.executable, REPOSITORY / "tools" / "get_demo_model.py"], capture_output=True, text=True)
    return done.stdout.strip() or sys.exit(done.stderr)


def make_model(tokenizer: str) -> dict:
    """Random weights of the shape, with a tokenizer, as a Hugging Face directory."""
    from jaxtune.assemble import FULL, Source, assemble
    from jaxtune.hf_io import resolve_model, write_model
    from jaxtune.mesh import single_device_mesh
    from jaxtune.models.families import parse_config
    from jaxtune.tokenizer import load_tokenizer

    words = resolve_model(tokenizer, weights=False)
    source = Source(words, parse_config(SHAPE, "bench.py"), load_tokenizer(words))
    made = assemble(source, FULL, single_device_mesh(), init="random")
    write_model(HOME / "model", made.params, made.model.weights, made.model.config, words, tokenizer=source.tokenizer)
    return {}


def make_rows(config: str) -> dict:
    """The very tokens and labels of jaxtune's data, for the peer."""
    from jaxtune.assemble import Source
    from jaxtune.config import load_config
    from jaxtune.data.loader import build_data

    settings = load_config(config)
    examples = build_data(
        settings.data, settings.eval, settings.train, Source.open(settings.model).tokenizer
    ).train.examples
    rows = [
        {"input_ids": t.tolist(), "supervised": s.tolist()}
        for start, end in zip(examples.starts[:-1], examples.starts[1:], strict=True)
        for t, s in [(examples.tokens[start:end], examples.supervised[start:end])]
    ]
    (HOME / "rows.json").write_text(json.dumps(rows))
    return {}


def jaxtune(config: str, steps: str) -> dict:
    import shutil

    import jaxtune.loop
    from jaxtune.config import load_config

    shutil.rmtree(HOME / "run", ignore_errors=True)
    rows = jaxtune.loop.train(load_config(config, [f"train.steps={int(steps) + WARM}"]))[WARM:]
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in rows)
    return result(sum(row["tokens"] for row in rows), sum(row["supervised_tokens"] for row in rows), seconds)


def trainer(config: str, steps: str) -> dict:
    """Transformers' Trainer with PEFT, one conversation at a time, two accumulated."""
    import tempfile

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=LORA["targets"], task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(HOME / "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(HOME / "model", dtype=torch.float32), lora)
    total = 4 * int(steps) + WARM  # its steps are shorter: two conversations, not two packs
    rows = json.loads((HOME / "rows.json").read_text())[: 2 * total]
    rows = [
        {"input_ids": r["input_ids"], "labels": [t if s else -100 for t, s in zip(r["input_ids"], r["supervised"])]}
        for r in rows
    ]

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends: list[float] = []
            self.tokens: list[tuple[int, int]] = []

        def on_step_end(self, *_, **__):
            self.ends.append(time.perf_counter())

    clock = Clock()
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)

    def counted(batch):
        labels = [label for row in batch for label in row["labels"][1:]]
        clock.tokens.append((sum(len(row["input_ids"]) for row in batch), sum(label != -100 for label in labels)))
        return collate(batch)

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=total,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=counted, callbacks=[clock]).train()
    seen = clock.tokens[2 * WARM : 2 * total]
    seconds = clock.ends[-1] - clock.ends[WARM - 1]
    return result(sum(tokens for tokens, _ in seen), sum(supervised for _, supervised in seen), seconds)


def result(tokens: int, supervised: int, seconds: float) -> dict:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rates = {"tokens_per_second": tokens / seconds, "supervised_per_second": supervised / seconds}
    return {name: round(value, 2) for name, value in {**rates, "peak_gb": peak, "seconds": seconds}.items()}


def summarise(results: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Medians, and the spread of the rate."""
    summary = {}
    for side, rounds in results.items():
        rates = sorted(one["tokens_per_second"] for one in rounds)
        summary[side] = {name: round(statistics.median(one[name] for one in rounds), 2) for name in rounds[0]}
        summary[side] |= {"slowest": rates[0], "fastest": rates[-1]}
    return summary


def print_table(summary: dict[str, dict[str, float]]) -> None:
    from importlib.metadata import version

    names = ("jax", "torch", "transformers", "peft")
    print("\n" + ", ".join(f"{name} {version(name)}" for name in names))
    print("| | real tokens/s (slowest to fastest) | supervised tokens/s | peak GB |\n|---|---|---|---|")
    for side, row in summary.items():
        rate = f"{row['tokens_per_second']:.1f} ({row['slowest']:.1f} to {row['fastest']:.1f})"
        print(f"| {side} | {rate} | {row['supervised_per_second']:.1f} | {row['peak_gb']:.1f} |")
    ratio = summary["jaxtune"]["tokens_per_second"] / summary["trainer"]["tokens_per_second"]
    print(f"\njaxtune / Trainer: {ratio:.2f}")


PARTS = {"make-model": make_model, "make-rows": make_rows, "jaxtune": jaxtune, "trainer": trainer}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        print(json.dumps(PARTS[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
