#!/usr/bin/env python3
"""Kill a training run at random moments until it is done, and compare it with one that nobody killed.

usage: crash_loop.py [--rounds N] [--seed S] [--home DIR]

The run is of a tiny random model that this tool writes, with all that could go out of step: dropout, packing, shuffles,
a schedule, evaluations, saves in the background. Each round starts the same command and sends it SIGKILL, after a step
or in the middle of a save; the last start is left alone. What it then has must be, bit for bit, what a run has that was
never killed: the ledger (every step's batch, loss and gradient norm), the evaluations and the adapter's bytes. It ends
with 1 when they differ.

Every process is forked from one that has imported jaxtune already, so that a round costs little more than its steps.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

STEPS, EVERY = 40, 3  # of the run; between its saves
LONGEST = 300  # seconds that a start may take to the moment that it is killed at, or to its end
ROWS = [{"instruction": f"What is {n}?", "output": f"It is number {n}."} for n in range(20)]
MODEL = {
    "model_type": "qwen2",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TEMPLATE = "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"


def write_run(home: Path, **sections: dict) -> Path:
    """A model, its tokenizer, data and the configuration of a run in `home`/run; the configuration's path.

    sections: keys that take the place of the usual ones.
    """
    write_model(home / "model")
    (home / "data.json").write_text(json.dumps(ROWS), encoding="utf-8")
    tree: dict[str, dict] = {
        "model": {"path": str(home / "model"), "init": "random"},
        "tune": {"method": "lora", "rank": 4, "dropout": 0.1, "targets": "all-linear"},
        "data": {"path": str(home / "data.json"), "max_length": 128},
        "train": {"output_dir": str(home / "run"), "steps": STEPS, "batch_size": 2, "micro_batches": 2},
        "optim": {"lr": 0.01, "schedule": "cosine", "warmup": 0.1},
        "mesh": {"data": 1, "fsdp": 1},
        "checkpoint": {"every": EVERY},
        "eval": {"fraction": 0.1, "every": 10},
        "log": {"every": 1, "tensorboard": False},
    }
    merged = {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}
    path = home / "config.yaml"
    path.write_text(json.dumps(merged), encoding="utf-8")  # JSON is YAML
    return path


def write_model(directory: Path) -> None:
    """The settings of a model of two layers, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|pad|>", "<|start|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(words[:3])
    names = {"pad_token": words[0], "eos_token": words[2]}
    PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **names).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")


class Trainer:
    """A process that trains as a configuration says; what it prints goes to a file beside the configuration.

    environment: variables that are set in it before JAX looks for devices.
    """

    def __init__(self, config: Path, *overrides: str, environment: dict[str, str] | None = None):
        self.run, self._log = config.parent / "run", config.parent / "output.txt"
        arguments = ["train", "--config", str(config), *overrides]
        self._process = _forks().Process(target=_train, args=(arguments, str(self._log), environment or {}))
        self._process.start()
        self._end = time.monotonic() + LONGEST

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        """Until something is there, or the process is not.

        Raises:
            TimeoutError: neither came.
        """
        while self._process.is_alive() and not is_there():
            if time.monotonic() > self._end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"nothing came of it within {LONGEST} s:\n{self.output}")
            time.sleep(0.001)

    def send(self, number: int) -> int:
        """Send a signal, if the process is there, and wait for the exit code."""
        if self._process.is_alive():
            os.kill(self._process.pid or 0, number)
        return self.wait()

    def wait(self) -> int:
        """The exit code; of a process that a signal has killed, minus its number."""
        self._process.join(LONGEST)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"not done within {LONGEST} s:\n{self.output}")
        return self._process.exitcode

    def finish(self) -> str:
        """Wait for a good end; what was printed.

        Raises:
            RuntimeError: it ended in another way.
        """
        if code := self.wait():
            raise RuntimeError(f"it ended with {code}:\n{self.output}")
        return self.output


def _forks() -> Any:
    context = multiprocessing.get_context("forkserver")
    # The last is what transformers would import in each of them.
    context.set_forkserver_preload(["jaxtune.cli", "jaxtune.loop", "transformers.models.auto.tokenization_auto"])
    return context


def _train(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """In the process of a Trainer."""
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from jaxtune.cli import main

    main(arguments)


def crash(
    config: Path, rounds: int, seed: int, tell: Callable[[str], None], environment: dict[str, str] | None = None
) -> None:
    """Start the run and kill it, so many times, and then let it go on to its end.

    Raises:
        RuntimeError: a start ended by itself, and not well.
    """
    draw, longest = random.Random(seed), max(2 * STEPS // (rounds + 1), 1)  # noqa: S311
    for number in range(1, rounds + 1):
        trainer = Trainer(config, environment=environment)
        # The steps that a start goes back to are repeated, so each kill comes later than the one before.
        moment = _moment(trainer, draw, min(steps_of(trainer.run) + draw.randint(1, longest), STEPS - 2))
        code = trainer.send(signal.SIGKILL)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"round {number}: it ended with {code}:\n{trainer.output}")
        how = f"killed {moment}" if code else "it was done before it could be killed"
        tell(f"round {number}: {how}, with {steps_of(trainer.run)} steps in the ledger")
    Trainer(config, environment=environment).finish()


def _moment(trainer: Trainer, draw: random.Random, steps: int) -> str:
    """Wait for the moment to kill: soon after so many steps, or a little into the next save after them."""
    delay, in_save = draw.uniform(0, 0.05), draw.random() < 0.5
    trainer.wait_for(lambda: steps_of(trainer.run) >= steps)
    if in_save:
        trainer.wait_for(lambda: any((trainer.run / "checkpoints").glob("*.saving")))
    time.sleep(delay)
    return f"{1000 * delay:.0f} ms {'into a save' if in_save else f'after step {steps}'}"


def steps_of(run: Path) -> int:
    """How many steps the ledger has."""
    ledger = run / "ledger.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def result(run: Path) -> dict[str, Any]:
    """What two runs must have in common."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    adapter = (run / "adapter/adapter_model.safetensors").read_bytes()
    evaluations = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    return {"ledger": ledger, "evaluations": evaluations, "adapter's SHA-256": hashlib.sha256(adapter).hexdigest()}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What is not equal of two results, a line each; of the ledgers, the first step that differs."""
    return [f"{name}: {_shown(ours[name], theirs[name])}" for name in ours if ours[name] != theirs[name]]


def _shown(ours: Any, theirs: Any) -> str:
    if isinstance(ours, list):
        ours, theirs = next(pair for pair in itertools.zip_longest(ours, theirs) if pair[0] != pair[1])
    return f"{ours} and {theirs}"


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how many times to kill it")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--home", type=Path, help="directory to keep both runs in; by default a temporary one")
    options = parser.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory(prefix="crash-loop-") as temporary:
        home = options.home or Path(temporary)
        whole, cut = (write_run(home / name) for name in ("uninterrupted", "killed"))
        Trainer(whole).finish()
        crash(cut, options.rounds, options.seed, partial(print, flush=True))
        found = differences(result(cut.parent / "run"), result(whole.parent / "run"))
    for line in found:
        print(f"DIFFERENT {line}")
    print(f"{options.rounds} rounds, seed {options.seed}: {'different' if found else 'the same, bit for bit'}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
