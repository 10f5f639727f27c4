"""The job that jaxtune is for, on a real model and real data: SmolLM2 as a Qwen2, LoRA on q and v, huanhuan."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxtune.assemble import Source
from jaxtune.config import ModelSection, make_config
from jaxtune.data.loader import build_data
from tests.peer import read_jsonl
from tests.runs import write_config

pytestmark = [pytest.mark.real, pytest.mark.slow]
STEPS, EVERY, HELD_OUT = 8, 4, 8


@pytest.fixture(scope="module")
def run(smollm2, shared, tmp_path_factory, run_cli):
    """The configuration and the rows of metrics.jsonl of a run."""
    home = tmp_path_factory.mktemp("huanhuan")
    rows = json.loads((shared / "data/huanhuan.json").read_text(encoding="utf-8"))
    short = [row for row in rows if len(row["instruction"] + row["output"]) < 60]
    for name, part in {"train": short[HELD_OUT:], "held_out": short[:HELD_OUT]}.items():
        (home / f"{name}.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    tree = {
        "model": {"path": str(smollm2.qwen2)},
        "tune": {"rank": 8, "alpha": 32, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
        "data": {"path": str(home / "train.json"), "max_length": 256, "system": "现在你要扮演皇帝身边的女人--甄嬛"},
        "train": {"output_dir": str(home / "run"), "steps": STEPS, "batch_size": 2},
        "optim": {"lr": 2e-3},
        "eval": {"path": str(home / "held_out.json"), "every": EVERY},
        "log": {"every": 1},
    }
    done = run_cli("--config", write_config(home / "config.yaml", tree), timeout=1200, optimised=True)
    assert done.returncode == 0, done.stderr
    return make_config(tree), read_jsonl(home / "run/metrics.jsonl")


def test_train_and_eval_loss_fall(run):
    _, rows = run
    losses = [row["loss"] for row in rows]
    assert len(losses) == STEPS
    assert np.mean(losses[-EVERY:]) < np.mean(losses[:EVERY]) - 0.1
    evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(evaluations) == STEPS // EVERY
    assert evaluations == sorted(evaluations, reverse=True)


def test_peft_s_eval_loss_on_our_adapter_equals_ours(run):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config, rows = run
    tokenizer = Source.open(ModelSection(path=config.model.path)).tokenizer
    examples = build_data(config.data, config.eval, config.train, tokenizer).eval.examples
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    peer = PeftModel.from_pretrained(base, f"{config.train.output_dir}/adapter").eval()
    total, count = 0.0, 0
    for tokens, supervised in map(examples.read, range(len(examples))):
        labels = torch.tensor(np.where(supervised, tokens, -100))[None].long()
        with torch.no_grad():
            loss = peer(input_ids=torch.tensor(tokens)[None].long(), labels=labels).loss
        total += float(loss) * supervised[1:].sum()
        count += supervised[1:].sum()
    assert rows[-1]["eval_loss"] == pytest.approx(total / count, abs=1e-3)


def test_the_run_directory_holds_what_the_readme_says(run):
    config, rows = run
    directory = Path(config.train.output_dir)
    assert {"step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_second"} <= set(rows[0])
    assert len(read_jsonl(directory / "ledger.jsonl")) == STEPS
    assert list((directory / "tensorboard").glob("events.out.tfevents.*"))
