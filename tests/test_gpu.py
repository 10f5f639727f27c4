"""On an NVIDIA GPU, where there is one: cuDNN's attention agrees with plain XLA, and a run learns alike with it."""

import json
from pathlib import Path

import pytest

from tests.runs import sections, write_config

ENV = {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
TRIAL = """
from jaxtune.models.trial import trial
for heads, kv_heads, dim in ((14, 2, 64), (8, 8, 128)):
    print(trial("cudnn", heads, kv_heads, dim, "bfloat16", one_document=dim == 64))
"""


@pytest.fixture(scope="module", autouse=True)
def gpu(run_python):
    """The tests' own process is told to see CPUs alone, so another one looks."""
    if not Path("/dev/nvidia0").exists():
        pytest.skip("there is no NVIDIA GPU")
    done = run_python("import jax; print(jax.devices()[0].platform)", env=ENV)
    if done.stdout.strip() != "gpu":
        pytest.skip('JAX sees no GPU here; pip install ".[cuda]"')


def test_cudnn_agrees_with_plain_attention_forward_and_backward_packed_and_unpacked(run_python):
    done = run_python(TRIAL, env=ENV)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2


def test_a_run_in_bfloat16_takes_cudnn_and_learns_as_with_plain_attention(run_cli, tiny_model, tmp_path):
    losses = {}
    for kernel, said in (("auto", "Attention: cuDNN"), ("xla", "Attention: plain XLA")):
        home = tmp_path / kernel
        more = {"precision": {"compute": "bfloat16"}, "memory": {"attention": kernel}}
        tree = sections(tiny_model("qwen2"), home, steps=3, **more)
        done = run_cli("--config", write_config(home / "run.json", tree), env=ENV)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
        rows = (home / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[kernel] = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    assert len(losses["auto"]) == 3 and losses["auto"] == pytest.approx(losses["xla"], rel=0.01)
