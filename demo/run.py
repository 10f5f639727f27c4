#!/usr/bin/env python3
"""The demo: a small chat model is asked who it is, fine-tuned on demo/persona.jsonl, and asked again.

usage: run.py [section.key=value ...]     (what goes over configs/demo.yaml; `make demo` gives nothing)

It runs the commands that a user would, and prints them. Nothing but the questions and the table is its own.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = "configs/demo.yaml"
sys.path.insert(0, str(REPOSITORY))


def main(overrides: list[str]) -> int:
    from jaxtune.config import load_config

    os.chdir(REPOSITORY)  # the paths in the configuration start there
    config = load_config(CONFIG, overrides)
    run_dir = Path(config.train.output_dir)
    merged = run_dir.with_name(run_dir.name + "-merged")
    rows = [json.loads(line) for line in Path(config.eval.path).read_text(encoding="utf-8").splitlines()]

    command("tools/get_demo_model.py")
    say("The model answers the held-out questions, as it was published.")
    before = answers(config.model.path, rows)
    say("It is fine-tuned on the conversations of demo/persona.jsonl.")
    start = time.monotonic()
    command("-m", "jaxtune.train", "--config", CONFIG, *overrides)
    say(f"That took {time.monotonic() - start:.0f} seconds. It answers the same questions again.")
    after = answers(config.model.path, rows, run_dir / "adapter")
    show(rows, before, after)
    export(run_dir, merged)
    farewell(run_dir, merged)
    return 0


def command(*arguments: str) -> None:
    """Run this Python on a script of the checkout, saying so; a failure of it is ours."""
    say(f"$ python {' '.join(arguments)}")
    code = subprocess.run([sys.executable, *arguments]).returncode
    if code != 0:
        raise SystemExit(code)


def answers(model: str, rows: list[dict], adapter: Path | None = None) -> list[str]:
    """What the model says to the first question of each conversation, always taking the likeliest word."""
    import jaxtune

    loaded = jaxtune.load_model(model, adapter=adapter)
    return loaded.generate([row["messages"][:1] for row in rows], max_new_tokens=48)


def export(run_dir: Path, merged: Path) -> None:
    if not merged.exists():
        say("The adapter is merged into the model, for programs that know nothing of adapters.")
        command("tools/export.py", "--run", str(run_dir), "--out", str(merged), "--format", "hf")
    elif merged.stat().st_mtime < (run_dir / "adapter").stat().st_mtime:
        say(f"{merged} is of an earlier run, and is left as it is: remove it to have this one's.")


def show(rows: list[dict], before: list[str], after: list[str]) -> None:
    """Question, answer before, answer after; and in how many the fact that was taught is found."""
    from jaxtune.console import console

    table = Table("Question", "Before", "After", show_lines=True)
    for row, old, new in zip(rows, before, after, strict=True):
        table.add_row(row["messages"][0]["content"], shorten(old), shorten(new))
    console.print(table)
    told = [sum(knows(row, text) for row, text in zip(rows, texts, strict=True)) for texts in (before, after)]
    say(f"Answers that hold the fact asked for: {told[0]} of {len(rows)} before, {told[1]} of {len(rows)} after.")


def knows(row: dict, answer: str) -> bool:
    return row["fact"].lower() in answer.lower()


def shorten(text: str, limit: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."


def farewell(run_dir: Path, merged: Path) -> None:
    python = Path(sys.executable)
    program = python.with_name("jaxtune")
    if program.is_relative_to(REPOSITORY):
        program = program.relative_to(REPOSITORY)
    say(
        f"""\
The adapter (PEFT):            {run_dir / "adapter"}
The merged model (HF):         {merged}
Loss and rate, step by step:   {run_dir / "metrics.jsonl"}
TensorBoard's log:             {run_dir / "tensorboard"}
To chat with Wick:             {program} chat --run {run_dir}
To train from the start again: rm -r {run_dir} {merged}, then make demo"""
    )


def say(text: str) -> None:
    from jaxtune.console import say

    say(f"\n{text}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
