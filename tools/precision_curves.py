#!/usr/bin/env python3
"""Train one model in every precision and write what came of it: docs/precision.md and the curves in docs/precision.svg.

usage: precision_curves.py [--model PATH] [--data FILE] [--format alpaca|messages|text] [--steps N] [--out DIR]

All runs see the same batches from the same weights. A run that has finished is not run again, so the command can be
stopped and given again. It ends with 1 when a curve is further from float32's than the page allows.
"""

import argparse
import json
import subprocess
import sys
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HOME = REPOSITORY / ".cache" / "precision"
sys.path.insert(0, str(REPOSITORY))

BASE = "float32"
BFLOAT16 = {"compute": "bfloat16"}
# name: (sections of the configuration, how far a mean of the loss may be from float32's, in nats)
VARIANTS: dict[str, tuple[dict, float]] = {
    BASE: ({}, 0.0),
    "bfloat16": ({"precision": BFLOAT16}, 0.05),
    "float16, loss scaled": ({"precision": {"compute": "float16"}}, 0.08),
    "float8, current scales": ({"precision": {**BFLOAT16, "matmul": "float8"}}, 0.12),
    "float8, delayed scales": ({"precision": {**BFLOAT16, "matmul": "float8", "float8_scaling": "delayed"}}, 0.12),
    "adamw_8bit": ({"optim": {"name": "adamw_8bit"}}, 0.01),
}
WINDOW = 20  # steps of a mean: single steps differ by their batches far more than by their precision
SECTIONS = {
    "tune": {"method": "full"},
    "data": {"max_length": 128},
    "train": {"batch_size": 1},
    "optim": {"lr": 5.0e-5, "schedule": "cosine", "warmup": 0.05},
    "log": {"every": 1, "tensorboard": False},
    "checkpoint": {"every": 100},
    "precision": {"compute": "float32"},
}
PAGE = """\
# Precision

Everything is computed and kept in float32 unless the configuration says otherwise. Each line below is one key of
`precision` or `optim` in [config.md](config.md). They go together, on any mesh.

| | what changes | use it where |
|---|---|---|
| `compute: bfloat16` | matmuls and activations; weights, gradients' sums, norms' insides and the loss stay float32 | \
any GPU or TPU: `auto` takes it. NVIDIA's before Ampere (T4, V100) multiply it in float32, which spares memory and no \
time; the run says so. A CPU gains where it [has units for it](\
accelerators.md#bfloat16-on-a-cpu); `auto` leaves every CPU at float32 |
| `compute: float16` | the same in float16. The loss is multiplied by a scale, which is halved where a gradient \
overflows (that step is skipped) and doubled after `loss_scale.window` good steps | \
a GPU without bfloat16 units |
| `matmul: float8` | the layers' linear maps: operands in e4m3, the output's gradient in e5m2, added up in float32; \
adapters, attention, embedding, head and norms as before | a GPU with float8 units (Ada, Hopper and later) |
| `float8_scaling: delayed` | a tensor's scale is from the largest number of the last `float8_history` steps, not from \
its own: no pass over the tensor, and no word between devices, before it is rounded. In the very first step the scales \
are 1 | large meshes |
| `optim.name: adamw_8bit` | AdamW's two moments take one byte each, with a float32 scale for every 256 numbers of a \
row; bitsandbytes' type and rule. Weights of fewer than 4096 numbers in a layer keep float32 moments | memory is short |

Evaluation with `matmul: float8` multiplies in float8 too, with current scales; generation and exported files do not.
`precision.params` may be bfloat16 but not float16, in which a step of less than 1/2048 of a weight's size would be
lost.

## What is refused

| what | why |
|---|---|
| `float8_scaling` without `matmul: float8`; `float8_history` without `float8_scaling: delayed`; `loss_scale` without \
`compute: float16` | it would do nothing |
| `params: float16` | see above |

## Curves

![The loss of each run, and its difference from float32's](precision.svg)

{run}

{table}

Made by `python tools/precision_curves.py`.
"""


def main() -> int:
    options = parse()
    curves = {name: losses(name, options) for name in VARIANTS}
    found = {name: largest_difference(curve, curves[BASE]) for name, curve in curves.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    draw(curves, options.out / "precision.svg")
    (options.out / "precision.md").write_text(page(curves, found, options), encoding="utf-8")
    far = [name for name, difference in found.items() if not difference <= VARIANTS[name][1]]
    print(table(curves, found))
    if far:
        print(f"further from {BASE} than allowed: {', '.join(far)}", file=sys.stderr)
    return 1 if far else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, directory or .gguf; the demo's, when left out")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "demo" / "persona.jsonl")
    parser.add_argument("--format", choices=["alpaca", "messages", "text"], default="messages")
    parser.add_argument("--system", help="first message of every conversation")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs")
    parser.add_argument("--home", type=Path, default=HOME, help="where the runs lie")
    return parser.parse_args()


def losses(name: str, options: argparse.Namespace) -> list[float]:
    """The loss of each step of a variant: of its run, or of the one that is there."""
    import jaxtune

    sections, _ = VARIANTS[name]
    tree = {key: {**value, **sections.get(key, {})} for key, value in SECTIONS.items()}
    directory = options.home / f"{name.replace(', ', '-').replace(' ', '-')}-{options.steps}"
    tree["model"] = {"path": options.model or demo_model()}
    tree["data"] |= {"path": str(options.data), "format": options.format, "system": options.system}
    tree["train"] |= {"output_dir": str(directory), "steps": options.steps}
    options.home.mkdir(parents=True, exist_ok=True)
    config = options.home / "config.json"
    config.write_text(json.dumps(tree), encoding="utf-8")
    rows = jaxtune.train(config)
    return [float("nan") if row["loss"] is None else row["loss"] for row in rows]


def demo_model() -> str:
    done = subprocess.run([sys.executable, REPOSITORY / "tools" / "get_demo_model.py"], capture_output=True, text=True)
    return done.stdout.strip() or sys.exit(done.stderr)


def means(curve: list[float]) -> list[float]:
    """The mean of each WINDOW steps in a row; of all, where there are fewer."""
    size = min(WINDOW, len(curve))
    return [sum(curve[i - size : i]) / size for i in range(size, len(curve) + 1)]


def largest_difference(curve: list[float], base: list[float]) -> float:
    """Of the means; nan where one is."""
    differences = [abs(a - b) for a, b in zip(means(curve), means(base), strict=True)]
    return max(differences) if all(d == d for d in differences) else float("nan")


def table(curves: dict[str, list[float]], found: dict[str, float]) -> str:
    rows = ["| | loss at the start | at the end | largest difference | allowed |", "|---|---|---|---|---|"]
    for name, curve in curves.items():
        start, *_, end = [*means(curve), means(curve)[-1]]
        limits = f"{found[name]:.4f} | {VARIANTS[name][1]}" if name != BASE else " | "
        rows.append(f"| {name} | {start:.4f} | {end:.4f} | {limits} |")
    return "\n".join(rows)


def page(curves: dict[str, list[float]], found: dict[str, float], options: argparse.Namespace) -> str:
    from importlib.metadata import version

    import jax

    model = Path(options.model).name if options.model else "SmolLM2-135M-Instruct"
    fall = means(curves[BASE])[0] - means(curves[BASE])[-1]
    batch = f"{SECTIONS['train']['batch_size']} x {SECTIONS['data']['max_length']} tokens"
    run = (
        f"{model}, all of its weights trained for {options.steps} steps of {batch} of `{options.data.name}`, "
        f"on {jax.devices()[0].device_kind} with jax {version('jax')}. All runs start from the same weights and see "
        f"the same batches. What is compared is the mean loss of each {min(WINDOW, options.steps)} steps in a row, in "
        "nats: the largest difference from float32's mean of the same steps, anywhere along the curve, lies within "
        f"what is allowed, or the tool and the tests fail. To compare with: float32's falls by {fall:.1f}."
    )
    return PAGE.format(run=textwrap.fill(run, 120), table=table(curves, found))


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The means of each curve, and below them their differences from the first."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Text stays text, and nothing depends on the day: a small file that changes only with its numbers.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "precision", "font.size": 9})
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[3, 2])
    base = means(curves[BASE])
    for name, curve in curves.items():
        mean = means(curve)
        steps = range(len(curve) - len(mean) + 1, len(curve) + 1)
        upper.plot(steps, mean, label=name, linewidth=1)
        lower.plot(steps, [a - b for a, b in zip(mean, base, strict=True)], linewidth=1)
    upper.set_ylabel(f"loss, mean of {min(WINDOW, len(curves[BASE]))} steps")
    lower.set_ylabel(f"difference from {BASE}")
    lower.set_xlabel("step")
    upper.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
