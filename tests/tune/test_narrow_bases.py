"""Methods that train norms, rows or networks of their own, over nf4 and in bfloat16: what moves and what comes back."""

import re

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune import loading
from jaxtune.assemble import Source, assemble
from jaxtune.config import load_config
from jaxtune.loading import open_run
from jaxtune.mesh import single_device_mesh
from tests.runs import sections, unfinish

METHODS = {
    "layernorm": {"method": "layernorm"},
    "trainable_tokens": {"method": "trainable_tokens", "token_indices": [*range(40, 123)]},
    "houlsby": {"method": "houlsby", "reduction_factor": 8},
}
OWN = {"layernorm": "norm", "trainable_tokens": r"\['embed'\]\['weight'\]\.rows_NE", "houlsby": r"\['hooks'\]"}
BASES = {
    "nf4": {"model": {"quantize": "nf4"}},
    "bfloat16": {"precision": {"params": "bfloat16", "compute": "bfloat16"}},
}
IDS = np.random.default_rng(0).integers(0, 384, (2, 12))


def arrays(params):
    """Where an array lies in the tree -> the array."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(array) for path, array in found}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_its_own_parts_alone_move_and_come_back(tiny_model, tmp_path, method, base, monkeypatch):
    tree = sections(tiny_model("qwen2"), tmp_path, tune=METHODS[method], optim={"lr": 0.03}, **BASES[base])
    losses = [row["loss"] for row in jaxtune.train(tree)]
    assert losses[-1] < losses[0] - 0.05, losses

    run, mesh, dtype = tmp_path / "run", single_device_mesh(), "bfloat16" if base == "bfloat16" else "float32"
    finished, logits = arrays(open_run(run, dtype, mesh).assembled.params), jaxtune.load_model(run).logits(IDS)
    unfinish(run)  # from here on the run is its last checkpoint
    checkpoint = arrays(open_run(run, dtype, mesh).assembled.params)
    assert finished.keys() == checkpoint.keys()
    for name, array in checkpoint.items():
        np.testing.assert_array_equal(finished[name], array, err_msg=name)
    np.testing.assert_array_equal(jaxtune.load_model(run).logits(IDS), logits)

    config = load_config(run / "config.yaml")
    source = Source.open(config.model, config.data.template, config.tune)
    first = arrays(assemble(source, source.tuning, mesh, dtype=dtype, seed=config.train.seed).params)
    own = {name for name in first if re.search(OWN[method], name)}
    assert {name for name in first if not np.array_equal(first[name], checkpoint[name])} == own != set()
    assert {checkpoint[name].dtype.name for name in own} == {"float32"}
    rest = {array.dtype.name for name, array in checkpoint.items() if name not in own}
    assert ("uint8" if base == "nf4" else "bfloat16") in rest

    monkeypatch.setattr(loading, "LARGE", 0)  # the same with layers apart
    np.testing.assert_allclose(jaxtune.load_model(run).logits(IDS), logits, atol=1e-5)
