"""The benchmark of a step's parts: what it counts, and that it runs what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models import decoder
from jaxtune.models.families import parse_config
from tools import bench_parts as tool
from tools.bench import SHAPE

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = parse_config(SHAPE | SIZES | {"vocab_size": 64, "num_hidden_layers": 2})
LINEAR = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16)  # weights


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(tool, "CONFIG", TINY)
    monkeypatch.setattr(tool, "HEADS", (8,))
    monkeypatch.setattr(tool, "ROWS", ((1, 256, None),))
    monkeypatch.setattr(tool, "LAYERS", ((2, 8),))
    monkeypatch.setattr(tool, "square", lambda dtype: jnp.ones((8, 8), dtype))


def test_tiles_count_whole_where_anything_in_them_is_seen():
    one = jnp.ones((1, 256), jnp.int32)
    assert tool.seen(one) == 3 * 128**2
    assert tool.seen(jnp.repeat(jnp.array([[1, 2]]), 128, axis=1)) == 2 * 128**2
    assert tool.seen(one.at[0, 129:].set(2)) == 3 * 128**2  # one token of the first document is in the second block
    assert tool.seen(jnp.ones((2, 130), jnp.int32)) == 2 * (128**2 + 2 * 128 + 2**2)


def test_documents_have_about_the_length_asked_for():
    segments = np.asarray(tool.documents(4, 4096, 64))
    assert 50 < segments[:, -1].mean() < 80 and (np.diff(segments) >= 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_part_runs_and_its_matmuls_are_those_of_its_shape(dtype):
    counted = {}
    for part in tool.PARTS.values():
        for name, flops, functions in part(dtype):
            counted[name] = flops
            for found in jax.tree.leaves([function() for function in functions]):
                assert np.isfinite(np.asarray(found, np.float32)).all()
    assert counted["head, 8 tokens"] == 4 * 8 * 64 * 16
    assert counted["attention, 1 x 256, one document"] == 2 * 7 * 2 * 4 * 4 * 3 * 128**2
    assert counted["layers, 2 x 8"] == 4 * LINEAR * 16


def test_layers_without_attention_train_what_lora_trains(monkeypatch):
    monkeypatch.setattr(decoder, "attend", None)  # nobody calls it
    for _, _, (run,) in tool.layers(jnp.float32):
        gradients = {path[-1].name: grad for path, grad in jax.tree_util.tree_leaves_with_path(run())}
        assert set(gradients) == {"a", "b"} and jnp.abs(gradients["b"]).max() > 0


def test_numbers_are_medians_and_ratios_are_of_one_round(monkeypatch):
    seconds = [[9, 9, 9], [1, 2, 1], [2, 4, 4], [4, 6, 3]]  # of the matmul, the part and its matmuls; compiling first
    monkeypatch.setattr(tool, "in_turns", lambda functions, rounds: seconds[1:])
    found = tool.measured("head", 2 * tool.PRODUCTS * 2 * 8.0**3, [None, None], 3, jnp.float32)
    assert (found["seconds"], found["times"]) == (4, 2.0) and found["share"] == pytest.approx(1.0)
    assert "| 4,000 |" in tool.row(found) and "| 100% |" in tool.row(found)
