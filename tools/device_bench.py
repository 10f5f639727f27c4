#!/usr/bin/env python3
"""What a step takes on this machine's accelerator, one row for each way of sparing memory: bytes and tokens per second.

usage: device_bench.py [--tokenizer DIR] [--data FILE] [--rows PATTERN] [--steps N] [--json FILE]

Random weights of Qwen2.5's shapes in bfloat16 compute, packs of 2048 tokens, all of them supervised. Each row is a
process of its own, since a device's peak is never forgotten. The share is that of the device's own rate for a bfloat16
product of two 8192 x 8192 matrices; it counts what the model asks for, so what is computed twice does not help it.
"""

import argparse
import fnmatch
import json
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HOME = REPOSITORY / ".cache" / "device_bench"
sys.path.insert(0, str(REPOSITORY))

from tools.bench import SHAPE  # noqa: E402

LARGE = SHAPE | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SHAPES = {"0.5B": SHAPE, "7B": LARGE}
LORA = {"method": "lora", "rank": 8, "alpha": 32, "targets": ["q_proj", "v_proj"]}
ALL_LINEAR = LORA | {"targets": "all-linear"}
FULL = {"method": "full"}
NARROW = {"params": "bfloat16", "compute": "bfloat16"}
WIDE = {"params": "float32", "compute": "bfloat16"}
LENGTH, WARM = 2048, 3


def row(shape, tune, batch, precision, *, offload=(), remat="block", **model) -> dict:
    memory = {"remat": remat, "offload": list(offload)}
    return {"shape": shape, "tune": tune, "train": {"batch_size": batch}, "precision": precision} | {
        "memory": memory,
        "model": model,
    }


KEPT = ["query", "key", "value", "after_attention", "gate", "up"]
ROWS = {
    "0.5B lora": row("0.5B", LORA, 8, NARROW),
    "0.5B lora, names kept": row("0.5B", LORA, 8, NARROW, remat=KEPT),
    "0.5B lora, nf4": row("0.5B", LORA, 8, NARROW, quantize="nf4"),
    "0.5B lora, int8": row("0.5B", LORA, 8, NARROW, quantize="int8"),
    "0.5B lora, all-linear": row("0.5B", ALL_LINEAR, 8, NARROW),
    "0.5B dora, all-linear": row("0.5B", ALL_LINEAR | {"method": "dora"}, 8, NARROW),
    "0.5B full": row("0.5B", FULL, 8, WIDE),
    "0.5B full, optimizer away": row("0.5B", FULL, 8, WIDE, offload=["optimizer"]),
    "0.5B full, params away": row("0.5B", FULL, 8, WIDE, offload=["params"]),
    "0.5B full, both away": row("0.5B", FULL, 8, WIDE, offload=["optimizer", "params"]),
    "0.5B full, names kept": row("0.5B", FULL, 8, WIDE, remat=KEPT),
    "0.5B full, names kept, activations away": row("0.5B", FULL, 8, WIDE, remat=KEPT, offload=["activations"]),
    "7B lora": row("7B", LORA, 4, NARROW),
    "7B lora, nf4": row("7B", LORA, 4, NARROW, quantize="nf4"),
}


def main() -> None:
    options = parse()
    HOME.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, settings in ROWS.items():
        if fnmatch.fnmatch(name, options.rows):
            found[name] = run_row(settings, options)
            print(f"{name}: {json.dumps(found[name])}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))
    print_table(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(HOME / "tokenizer"), help="directory with a tokenizer.json")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "demo" / "persona.jsonl")
    parser.add_argument("--rows", default="*", help="which rows, as a pattern of their names")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a row")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    return parser.parse_args()


def run_row(settings: dict, options: argparse.Namespace) -> dict:
    config = configuration(settings, options)
    path = HOME / "row.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, __file__, "--row", str(path), str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr or done.stdout).strip()[-2000:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def configuration(settings: dict, options: argparse.Namespace) -> dict:
    """Of a run, with the model's settings and the text that it learns written down beside it."""
    model = HOME / settings["shape"]
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(SHAPES[settings["shape"]]))
    texts = HOME / "texts.jsonl"
    if not texts.exists():
        lines = [json.loads(line) for line in options.data.read_text().splitlines() if line.strip()]
        words = "\n".join(message["content"] for line in lines for message in line["messages"])
        texts.write_text("".join(json.dumps({"text": f"{number} {words}"}) + "\n" for number in range(64)))
    return {name: part for name, part in settings.items() if name != "shape"} | {
        "model": {"path": str(model), "tokenizer": options.tokenizer, "init": "random", **settings["model"]},
        "data": {"path": str(texts), "format": "text", "max_length": LENGTH},
        "mesh": {"fsdp": 1},
        "train": {"output_dir": str(HOME / "run"), "steps": options.steps + WARM, **settings["train"]},
        "log": {"tensorboard": False},
    }


def measure(path: str, steps: str) -> dict:
    """A row, in the process that runs it."""
    import jax

    from jaxtune import loop, tune
    from jaxtune.assemble import Source
    from jaxtune.config import load_config
    from jaxtune.data.loader import build_data
    from jaxtune.mesh import make_mesh
    from jaxtune.plan.flops import model_flops
    from tools.bench_peers.matmul import matmul_rate, square

    config = load_config(path, [])
    config = config.model_copy(update={"tune": tune.resolve(config.tune)})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    source = Source.open(config.model, None, config.tune)
    data = build_data(config.data, config.eval, config.train, source.tokenizer)
    started = time.monotonic()
    job = loop.prepare(config, source, data, mesh)
    ready = time.monotonic() - started
    losses, begun, tokens = [], started, 0
    for number, batch in zip(range(1, WARM + int(steps) + 1), data.train.batches(1)):
        placed = job.program.put(batch.arrays())
        job.state, metrics = job.train_step(job.state, job.program.frozen, placed, jax.numpy.int32(number))
        losses.append(metrics["loss"])
        tokens += batch.num_tokens
        if number == WARM:
            begun, tokens = synced(metrics), 0
    seconds = synced(metrics) - begun
    memory = job.train_step.memory_analysis()
    assembled, count = job.assembled, data.train.shape[-1] * config.train.batch_size
    asked = model_flops(
        assembled.model.config, assembled.model.weights, assembled.mask, assembled.params, count, LENGTH
    )
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "device": device.device_kind,
        "tokens_per_second": round(tokens / seconds),
        "tflops": round(asked * int(steps) / seconds / 1e12, 1),
        "share": round(asked * int(steps) / seconds / matmul_rate(square()), 3),
        "peak_gb": round(peak / 1e9, 2),
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "temporaries_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "host_gb": round((memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes) / 1e9, 2),
        "ready_s": round(ready, 1),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
    }


def synced(metrics: dict) -> float:
    """The time, once the step is done."""
    float(metrics["loss"])
    return time.monotonic()


def print_table(found: dict[str, dict]) -> None:
    import jax

    print(
        f"\njax {jax.__version__}; {next((row['device'] for row in found.values() if 'device' in row), 'no device')}\n"
    )
    print("| | tokens/s | share of the matmul rate | peak GB | arguments + temporaries GB | on the host GB |")
    print("|---|---|---|---|---|---|")
    for name, one in found.items():
        if "failed" in one:
            print(f"| {name} | failed: {one['failed'].splitlines()[-1][:100]} | | | | |")
        else:
            held = f"{one['arguments_gb']:.2f} + {one['temporaries_gb']:.2f}"
            rates = f"{one['tokens_per_second']:,} | {one['share']:.1%} | {one['peak_gb']:.2f}"
            print(f"| {name} | {rates} | {held} | {one['host_gb']:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main()
