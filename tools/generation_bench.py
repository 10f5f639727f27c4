#!/usr/bin/env python3
"""Generation on this machine beside transformers: tokens a second, the time to the first of them, memory.

usage: generation_bench.py [--model DIR] [--dtypes float32,bfloat16] [--rows 1,8] [--prompt N] [--new N] [--rounds N]

Both take the likeliest token of the same prompts of made-up tokens, and nothing ends an answer early. Each side is a
process of its own, in turns whose order is reversed every other round; within it one answer goes untimed, and the best
of three counts. Without --model: random weights of Qwen2.5-0.5B's shape, made in .cache/generation_bench.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tools import bench  # noqa: E402
from tools.bench_peers.common import Compiled, host_peak_gb  # noqa: E402

HOME = REPOSITORY / ".cache" / "generation_bench"
SIDES = ("jaxtune", "transformers")
DTYPES = {"float32", "bfloat16"}
MAKER = "model"  # not a side: makes the model
KEYS = ("rate", "first", "peak_gb", "compile")
TIMES = 3
Answer = Callable[[int], None]  # of so many tokens


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(make_model() if options.side == MAKER else measured(options.side, options)))
        return
    if options.model is None:
        options.model = run(MAKER)  # in a process of its own too: a child's peak begins with its parent's
    print("| | rows | tokens/s | first token, s | peak GB | compiling, s | tokens/s beside transformers |")
    print("|---|---|---|---|---|---|---|")
    for dtype in options.dtypes.split(","):
        for rows in map(int, options.rows.split(",")):
            found: dict[str, list[dict]] = {side: [] for side in SIDES}
            sizes = {name: getattr(options, name) for name in ("model", "prompt", "new")}
            for number in range(options.rounds):
                for side in SIDES[:: 1 if number % 2 == 0 else -1]:
                    found[side].append(run(side, dtypes=dtype, rows=rows, **sizes))
            for side in SIDES:
                print(row(side, dtype, rows, found), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face directory")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rows", default="1,8", help="prompts at a time")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", choices=(*SIDES, MAKER), help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.dtypes.split(",")) - DTYPES
    if unknown:
        parser.error(f"--dtypes: no {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(DTYPES))}")
    return options


def make_model() -> str:
    """Where it is."""
    if not (HOME / "model" / "config.json").exists():
        from jaxtune.hf_io import resolve_model
        from tools.bench_peers.prepare import make_model

        make_model("0.5B", resolve_model(bench.demo_model(), weights=False), HOME / "model")
    return str(HOME / "model")


def run(side: str, **sizes: Any) -> Any:
    try:
        return bench.run(Path(__file__), "--side", side, *(f"--{name}={value}" for name, value in sizes.items()))
    except bench.Failed as error:
        sys.exit(f"{side} failed: {error}")


def row(side: str, dtype: str, rows: int, found: dict[str, list[dict]]) -> str:
    """Medians of the rounds."""
    rate, first, peak, compiling = (median(one[key] for one in found[side]) for key in KEYS)
    compiled = times = ""
    if side == "jaxtune":
        compiled, times = f"{compiling:.1f}", f"{rate / median(one['rate'] for one in found['transformers']):.2f}"
    return f"| {side}, {dtype} | {rows} | {rate:.1f} | {first:.2f} | {peak:.1f} | {compiled} | {times} |"


def measured(side: str, options: argparse.Namespace) -> dict:
    rows = int(options.rows)
    prompts = [[1000 + (7919 * (at + row)) % 40000 for at in range(options.prompt)] for row in range(rows)]
    answer, compiled = (ours if side == "jaxtune" else theirs)(options.model, options.dtypes, prompts)
    for count in (1, options.new):
        answer(count)
    first = min(seconds(answer, 1) for _ in range(TIMES))
    whole = min(seconds(answer, options.new) for _ in range(TIMES))
    rate = rows * (options.new - 1) / (whole - first)
    return dict(zip(KEYS, (rate, first, host_peak_gb(), compiled()), strict=True))


def seconds(answer: Answer, count: int) -> float:
    began = time.perf_counter()
    answer(count)
    return time.perf_counter() - began


def ours(model: Path, dtype: str, prompts: list[list[int]]) -> tuple[Answer, Callable[[], float]]:
    compiled = Compiled()
    from jaxtune.generate import Generator
    from jaxtune.loading import open_model

    made = open_model(model, dtype=dtype).assembled
    asked = Generator(made.model, made.mesh, dtype, stop=())

    def answer(count: int) -> None:
        assert all(len(row) == count for row in asked.tokens(made.params, prompts, count))

    return answer, lambda: compiled.seconds


def theirs(model: Path, dtype: str, prompts: list[list[int]]) -> tuple[Answer, Callable[[], float]]:
    import torch
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    peer.generation_config.eos_token_id = None
    ids = torch.tensor(prompts)

    def answer(count: int) -> None:
        out = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        assert out.shape[1] == ids.shape[1] + count

    return answer, lambda: 0.0


if __name__ == "__main__":
    main()
