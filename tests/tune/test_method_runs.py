"""Whole runs of methods that sit on weights: learning, resumption, generation, and both exports. The peers are
transformers and peft.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune import ops
from jaxtune.config import tune_section
from jaxtune.errors import AdapterError
from jaxtune.export import export_run
from jaxtune.models.weights import HOOKS
from jaxtune.quant import int8
from tests.runs import sections
from tests.tune.support import TOKENS, difference, randomised, tuned

METHODS = {
    "oft": {"method": "oft", "targets": ["q_proj", "down_proj"], "oft_block_size": 8},
    "vera": {"method": "vera", "targets": ["q_proj", "down_proj"], "rank": 16},
    "loha": {"method": "loha", "targets": ["q_proj", "down_proj"], "rank": 2},
    "lokr": {"method": "lokr", "targets": ["q_proj", "down_proj"], "rank": 2},
}
IDS = np.random.default_rng(1).integers(0, 384, (2, 20))


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """made(method) -> (home of a run of four steps, its losses)."""
    found = {}

    def make(method):
        if method not in found:
            home = tmp_path_factory.mktemp(method)
            rows = jaxtune.train(sections(tiny_model("qwen2"), home, tune=METHODS[method], optim={"lr": 0.05}))
            found[method] = home, [row["loss"] for row in rows if "loss" in row]
        return found[method]

    return make


@pytest.mark.parametrize("method", METHODS)
class TestRuns:
    def test_it_learns_and_goes_on_bit_for_bit_from_a_checkpoint(self, made, method, tiny_model, tmp_path):
        home, losses = made(method)
        assert losses[-1] < losses[0]
        tree = sections(tiny_model("qwen2"), tmp_path, tune=METHODS[method], optim={"lr": 0.05}, steps=2)
        jaxtune.train(tree)
        jaxtune.train({**tree, "train": {**tree["train"], "steps": 4}})
        name = Path("run", "adapter", "adapter_model.safetensors")
        assert (home / name).read_bytes() == (tmp_path / name).read_bytes()

    def test_generation_is_what_the_logits_say(self, made, method):
        model = jaxtune.load_model(made(method)[0] / "run")
        prompt = [5, 6, 7, 8, 9]
        (new,) = model._generator.tokens(model.params, [prompt], 6)
        assert len(new) > 0
        for token in new:
            assert int(model.logits([prompt])[0, -1].argmax()) == token
            prompt = [*prompt, token]

    def test_both_exports_compute_the_same(self, made, method, tiny_model, tmp_path):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        run, base = made(method)[0] / "run", tiny_model("qwen2")
        ours = jaxtune.load_model(run).logits(IDS)
        assert difference(ours, jaxtune.load_model(base).logits(IDS)) > 0.01
        export_run(run, tmp_path / "peft", "peft")
        export_run(run, tmp_path / "hf", "hf")
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peers = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32),
            PeftModel.from_pretrained(plain, tmp_path / "peft"),
        )
        with torch.no_grad():
            for peer in peers:
                assert difference(ours, peer.eval()(torch.tensor(IDS)).logits.numpy()) < 1e-4


def test_a_method_that_does_not_fit_is_refused_before_any_weight_is_read(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.assemble.load_params", lambda *rest: pytest.fail("weights were read"))
    tune = {**METHODS["oft"], "oft_block_size": 5}
    with pytest.raises(AdapterError, match=r"tune.oft_block_size 5 does not fit the .* inputs of model.layers.0"):
        jaxtune.train(sections(tiny_model("qwen2"), tmp_path, tune=tune))


def logits(made, tokens, positions, segments, dtype=jnp.float32):
    @jax.jit
    def run(params):
        hidden, _ = made.model.hidden(params, tokens, positions, segments, dtype)
        return made.model.logits(params, hidden)

    return np.asarray(run(made.params))


@pytest.mark.parametrize("method", METHODS)
def test_packed_documents_are_each_their_own(method):
    made, alone = randomised(tuned(tune_section(**METHODS[method]))), np.arange(11)
    pack, ones = TOKENS.reshape(1, -1), np.ones_like(TOKENS)
    packed = logits(made, pack, np.tile(alone, 2)[None], np.repeat([1, 2], 11)[None])
    apart = logits(made, TOKENS, np.tile(alone, (2, 1)), ones)
    assert difference(packed.reshape(apart.shape), apart) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_computes_nearly_the_same(method):
    made = randomised(tuned(tune_section(**METHODS[method])))
    place = np.tile(np.arange(11), (2, 1)), np.ones_like(TOKENS)
    narrow, wide = (logits(made, TOKENS, *place, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert 0 < difference(narrow, wide) < 0.2
    assert np.corrcoef(narrow.ravel(), wide.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_it_lies_on_a_quantised_weight_as_on_the_one_that_this_stands_for(method):
    made = randomised(tuned(tune_section(**METHODS[method])))
    stacked = made.params["stacks"]["0"]["mlp"]["down_proj"]["weight"]
    base = jax.lax.map(int8.quantize, stacked.base)
    stacked = stacked.with_shared(made.params.get(HOOKS, {})) if method == "vera" else stacked
    narrow, wide = replace(stacked, base=base), replace(stacked, base=base.dense(False))
    np.testing.assert_allclose(ops.dense(narrow), ops.dense(wide), atol=1e-6)
    x = jnp.array(np.random.default_rng(0).normal(size=(3, 40)), jnp.float32)
    shared = {name: array for name in ("a", "b") if (array := getattr(stacked, name, None)) is not None}

    def first_layer(leaf):
        alone = replace(leaf, **dict.fromkeys(shared))  # the matrices of all layers have none along axis 0
        return replace(jax.tree.map(lambda part: part[0], alone), **shared)

    ours, theirs = (ops.linear(x, first_layer(leaf)) for leaf in (narrow, wide))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - x @ ops.dense(stacked)[0].T).max() > 1e-3  # int8 is not float32
