#!/usr/bin/env python3
"""Time and memory from many rows of conversations to batches: tokenised, packed, shuffled, and started again.

usage: data_bench.py [--rows N] [--tokenizer DIR] [--length N] [--batches N] [--home DIR] [--json FILE]
       data_bench.py --train FILE [--steps N] [--json FILE] [section.key=value ...]

With --train, a run of the loop on the configuration FILE instead: how long its steps waited for their batches, and how
many examples a second the loader gives when nobody computes. The run is written to a directory that is removed.

Every start is a process of its own, whose largest memory is told; so is that of the largest process that tokenises.
The rows are made up, of the words of this repository's pages.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
GB = 1e9


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(start(options)))
        return
    if options.train:
        print_result(train(options), options)
        return
    options.home.mkdir(parents=True, exist_ok=True)
    try:
        seconds = write_rows(options.home / "rows.jsonl", options.rows)
        print(f"{options.rows:,} rows, {size(options.home / 'rows.jsonl') / GB:.2f} GB, written in {seconds:.0f} s")
        results = {name: run_child(options, name) for name in ("first start", "second start")}
        kept = sum(size(path) for path in (options.home / "tokens").rglob("*") if path.is_file())
        print(f"tokens on disk: {kept / GB:.2f} GB")
    finally:
        shutil.rmtree(options.home, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": options.rows, "bytes_kept": kept, **results}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--tokenizer", help="directory or .gguf; the demo model's, when left out")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a pack")
    parser.add_argument("--batches", type=int, default=200, help="how many are timed")
    parser.add_argument("--home", type=Path, default=REPOSITORY / ".cache" / "data_bench", help="removed at the end")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--train", type=Path, metavar="FILE", help="a configuration whose steps' wait is measured")
    parser.add_argument("--steps", type=int, default=20, help="of --train; the first is not counted")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(path: Path, count: int) -> float:
    """Conversations of one or two turns; the seconds that it took."""
    began, chance = time.monotonic(), random.Random(0)  # noqa: S311 - no secret
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    words = [word for page in sorted(pages) for word in page.read_text(encoding="utf-8").split() if word.isalpha()]
    pool = chance.choices(words, k=1 << 20)

    def say(mean: float) -> str:
        at, length = chance.randrange(len(pool) - 1000), 2 + min(900, int(chance.expovariate(1 / mean)))
        return " ".join(pool[at : at + length])

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            pairs = [[{"role": "user", "content": say(12)}, {"role": "assistant", "content": say(40)}]]
            pairs += [pairs[0]] if chance.random() < 0.2 else []
            file.write(json.dumps({"messages": [message for pair in pairs for message in pair]}) + "\n")
    return time.monotonic() - began


def run_child(options: argparse.Namespace, name: str) -> dict:
    given = {"--rows": options.rows, "--length": options.length, "--batches": options.batches, "--home": options.home}
    if options.tokenizer:
        given["--tokenizer"] = options.tokenizer
    command = [sys.executable, __file__, "--child", *(str(word) for pair in given.items() for word in pair)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    *said, last = done.stdout.strip().splitlines()
    result = {key: round(value, 2) for key, value in json.loads(last).items()}
    told = [f"  {key}: {value:,}" for key, value in result.items()]
    print("\n".join([f"{name}:", *said, *told]), flush=True)
    return result


def start(options: argparse.Namespace) -> dict:
    """What one process of a run does before its first step, and how quickly its batches come."""
    from jaxtune.config import DataSection, EvalSection, TrainSection
    from jaxtune.data.dataset import Dataset
    from jaxtune.data.loader import build_data
    from jaxtune.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(options.tokenizer or demo_model()))
    files = {"path": str(options.home / "rows.jsonl"), "cache": str(options.home / "tokens"), "format": "messages"}
    section = DataSection.model_validate({**files, "max_length": options.length})
    began = time.monotonic()
    data = build_data(section, EvalSection(), TrainSection(steps=options.batches, batch_size=8), tokenizer)
    built, planning, cpu = time.monotonic(), time.process_time(), cpu_seconds()
    plan = data.train._plan(0)
    planned = time.process_time() - planning
    hashing = time.monotonic()
    assert isinstance(data.train, Dataset) and data.train.fingerprint
    hashed, reading = time.monotonic() - hashing, time.monotonic()
    documents = sum(int(batch.segments.max(axis=-1).sum()) for batch in data.train.batches())
    read = time.monotonic() - reading
    tokens = data.train.examples.num_tokens
    return {
        "examples": len(data.train.examples),
        "tokens": tokens,
        "packs": len(plan),
        "fill_percent": 100 * tokens / (len(plan) * options.length),
        "seconds_to_the_data": built - began,
        "rows_per_second": options.rows / (built - began),
        "tokens_per_second": tokens / (built - began),
        "cpu_seconds_of_all_processes": cpu,
        "cpu_seconds_of_a_plan": planned,
        "seconds_of_the_fingerprint": hashed,
        "examples_per_second_of_the_iterator": documents / read,
        "peak_bytes": peak(resource.RUSAGE_SELF),
        "peak_bytes_of_the_largest_worker": peak(resource.RUSAGE_CHILDREN),
    }


def train(options: argparse.Namespace) -> dict:
    """What the steps of a run wait for their data, and what the same loader could give."""
    from jaxtune import loop
    from jaxtune.config import load_config

    with tempfile.TemporaryDirectory() as home:
        places = [f"train.output_dir={home}/run", f"data.cache={home}/tokens"]
        own = [f"train.steps={options.steps}", "log.every=1", "eval.every=0"]
        config = load_config(options.train, [*options.overrides, *places, *own])
        rows = loop.train(config)[1:]
        given, taken = loader_rate(config)
    seconds = [row["tokens"] / row["tokens_per_second"] for row in rows]
    waits = [row["data_wait_seconds"] for row in rows]
    return {
        "steps": len(rows),
        "seconds_of_a_step": statistics.median(seconds),
        "milliseconds_a_step_waits": 1000 * statistics.median(waits),
        "milliseconds_the_slowest_waits": 1000 * max(waits),
        "percent_of_the_time": 100 * sum(waits) / sum(seconds),
        "examples_per_second_of_the_run": taken * len(rows) / sum(seconds),
        "examples_per_second_of_the_loader": given,
    }


def loader_rate(config: Any) -> tuple[float, float]:
    """(examples a second of the loader alone, examples of a step)."""
    from jaxtune.assemble import Source
    from jaxtune.data.loader import build_data

    tokenizer = Source.open(config.model, config.data.template).tokenizer
    # As many steps as a second or so needs, over and over the same rows.
    more = config.train.model_copy(update={"steps": 200})
    data = build_data(config.data, config.eval, more, tokenizer).train
    began = time.monotonic()
    found = sum(int(batch.segments.max(axis=-1).sum()) for batch in data.batches())
    return found / (time.monotonic() - began), found / data.steps


def print_result(result: dict, options: argparse.Namespace) -> None:
    rounded = {key: round(value, 3) for key, value in result.items()}
    print("\n".join(f"  {key}: {value:,}" for key, value in rounded.items()))
    if options.json:
        options.json.write_text(json.dumps(rounded, indent=1))


def peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_seconds() -> float:
    """Of this process and those that it has ended, so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def size(path: Path) -> int:
    return path.stat().st_size


def demo_model() -> str:
    tool = [sys.executable, str(REPOSITORY / "tools" / "get_demo_model.py")]
    return subprocess.run(tool, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
