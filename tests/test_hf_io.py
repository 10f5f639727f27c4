"""The arrays are the checkpoint's numbers, read once and only where they are needed; what is wrong is named first."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import SingleDeviceSharding
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxtune import hf_io
from jaxtune.errors import ModelError
from jaxtune.hf_io import check_weights, load_params, open_source
from jaxtune.models.decoder import Model
from jaxtune.models.families import FAMILIES, read_config
from jaxtune.models.weights import Tree, leaves_with_path, map_tree


def load(directory: Path, dtype="float32", stacks=None, progress=None) -> tuple[Tree, Tree]:
    """(declarations, arrays) of a model directory on one device."""
    config = read_config(directory)
    weights = Model.create(config, stacks).weights
    where = map_tree(lambda _: SingleDeviceSharding(jax.devices()[0]), weights)
    return weights, load_params(open_source(directory, config.tied), weights, where, dtype, progress)


def by_key(weights: Tree, params: Tree) -> dict[str, np.ndarray]:
    """The arrays under their Hugging Face keys."""
    found = {}
    for (_, weight), (_, array) in zip(leaves_with_path(weights), leaves_with_path(params), strict=True):
        rows = [array] if weight.layers is None else array
        found |= {key: np.asarray(row) for key, row in zip(weight.keys, rows, strict=True)}
    return found


def assert_equal_to_torch(directory: Path, weights: Tree, params: Tree) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    state = {key: value.detach().numpy() for key, value in model.named_parameters()}
    ours = by_key(weights, params)
    assert set(ours) == set(state)
    for key, array in ours.items():
        np.testing.assert_array_equal(array, state[key], err_msg=key)


def edit(source: Path, target: Path, change) -> Path:
    """A copy of a one-file model whose dict of tensors `change` has altered."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("shards", ["5GB", "50KB"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_arrays_are_what_transformers_loads(tiny_model, dtype, shards, tied):
    directory = tiny_model("qwen2", dtype=dtype, max_shard_size=shards, tie_word_embeddings=tied)
    assert (directory / "model.safetensors.index.json").exists() == (shards == "50KB")
    assert_equal_to_torch(directory, *load(directory))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_filled(tiny_model, family):
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    directory = tiny_model(family, **biases)
    assert_equal_to_torch(directory, *load(directory))


def test_layers_may_lie_in_several_stacks(tiny_model):
    directory = tiny_model("qwen2", num_hidden_layers=3)
    weights, params = load(directory, stacks=(range(2), range(2, 3)))
    assert params["stacks"]["0"]["mlp"]["up_proj"]["weight"].shape[0] == 2
    assert_equal_to_torch(directory, weights, params)


def test_the_arrays_have_the_dtype_asked_for(tiny_model):
    directory = tiny_model("qwen2")
    weights, params = load(directory, "bfloat16")
    assert {array.dtype for _, array in leaves_with_path(params)} == {jnp.dtype("bfloat16")}
    _, exact = load(directory)
    near = by_key(weights, exact)["model.norm.weight"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(params["norm"]["weight"], near)


def test_a_base_models_checkpoint_lacks_the_prefix_and_fits_a_tied_model(tiny_model, tmp_path):
    def strip(tensors):
        for key in [key for key in tensors if key.startswith("model.")]:
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    whole = tiny_model("qwen2", tie_word_embeddings=True)
    bare = edit(whole, tmp_path / "bare", strip)
    ours, theirs = by_key(*load(bare)), by_key(*load(whole))
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_a_tied_head_may_be_in_the_file_when_it_is_the_embedding(tiny_model, tmp_path):
    whole = tiny_model("qwen2", tie_word_embeddings=True)
    copy = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})  # noqa: E731
    assert "head" not in load(edit(whole, tmp_path / "copied", copy))[1]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_model_may_have_its_embedding_under_the_heads_name_alone(tiny_model, tmp_path, tied):
    rename = lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})  # noqa: E731
    directory = edit(tiny_model("qwen2", tie_word_embeddings=tied), tmp_path / "renamed", rename)
    if tied:
        assert_equal_to_torch(directory, *load(directory))
        return
    with pytest.raises(ModelError, match=r"missing weights \(1\): model\.embed_tokens\.weight"):
        load(directory)


@pytest.mark.parametrize("shape", [(384, 64), (384, 32)])
def test_a_tied_head_of_other_numbers_is_refused(tiny_model, tmp_path, shape):
    whole = tiny_model("qwen2", tie_word_embeddings=True)
    other = edit(whole, tmp_path / "other", lambda t: t.update({"lm_head.weight": torch.ones(shape)}))
    with pytest.raises(ModelError, match="set tie_word_embeddings to false"):
        load(other)


def test_rotary_buffers_of_old_files_are_left_alone(tiny_model, tmp_path):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    load(edit(tiny_model("qwen2"), tmp_path / "old", lambda t: t.update(old)))


class Unreadable:
    """A source whose shapes are known and whose weights must not be touched."""

    where = "there"

    def __init__(self, shapes):
        self.shapes = shapes

    def read(self, key, index):
        raise AssertionError(f"{key} was read before the checks were done")


def test_all_that_is_missing_unknown_or_misshaped_is_listed_before_anything_is_read(tiny_model):
    directory = tiny_model("qwen2")
    weights = Model.create(read_config(directory)).weights
    shapes = dict(open_source(directory).shapes)
    del shapes["model.layers.1.mlp.up_proj.weight"], shapes["model.norm.weight"]
    shapes["model.layers.7.mlp.up_proj.weight"] = (3, 3)
    shapes["model.layers.0.mlp.up_proj.weight"] = (64, 96)
    with pytest.raises(ModelError) as refusal:
        load_params(Unreadable(shapes), weights, map_tree(lambda _: None, weights), "float32")
    message = str(refusal.value)
    assert "there: the weights are not those of its config" in message
    assert "missing weights (2): model.norm.weight, model.layers.1.mlp.up_proj.weight" in message
    assert "unknown weights (1): model.layers.7.mlp.up_proj.weight" in message
    assert "model.layers.0.mlp.up_proj.weight is [64, 96], expected [96, 64]" in message


def test_an_untied_model_without_its_head_is_refused(tiny_model, tmp_path):
    whole = tiny_model("qwen2", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"missing weights \(1\): lm_head\.weight"):
        load(edit(whole, tmp_path / "headless", lambda t: t.pop("lm_head.weight")))


def test_a_long_list_of_names_is_cut_and_counted(tiny_model):
    weights = Model.create(read_config(tiny_model("qwen2", num_hidden_layers=3))).weights
    with pytest.raises(ModelError, match=r"missing weights \(39\): .* and 31 more"):
        check_weights(Unreadable({}), weights)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_model, tmp_path, dtype, number):
    def poison(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = number

    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight .*not finite"):
        load(edit(tiny_model("qwen2", dtype=dtype), tmp_path / "poisoned", poison))


def test_progress_goes_up_to_all_the_bytes_and_names_what_is_read(tiny_model, monkeypatch):
    monkeypatch.setattr(hf_io, "CHUNK_BYTES", 1000)
    calls = []
    _, params = load(tiny_model("qwen2"), progress=lambda *call: calls.append(call))
    total = sum(array.nbytes for _, array in leaves_with_path(params))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[-1][1:] == (total, total)
    assert "model.layers.1.self_attn.q_proj.weight" in {call[0] for call in calls}


def test_pieces_put_together_are_the_whole(tiny_model, monkeypatch):
    directory = tiny_model("qwen2", max_shard_size="50KB")
    _, whole = load(directory)
    monkeypatch.setattr(hf_io, "CHUNK_BYTES", 700)
    monkeypatch.setattr("jaxtune.safetensors_io.MAPPED_BYTES", 2000)
    _, pieces = load(directory)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, pieces))


SHARDED = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtune.hf_io import load_params, open_source
from jaxtune.models.decoder import Model
from jaxtune.models.families import read_config
from jaxtune.models.weights import leaves_with_path, map_tree

path = Path(sys.argv[1])
weights = Model.create(read_config(path)).weights
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

class Counting:
    def __init__(self):
        self.inner, self.numbers, self.where = open_source(path), 0, ""
        self.shapes = self.inner.shapes
    def read(self, key, index):
        part = self.inner.read(key, index)
        self.numbers += part.size
        return part

def spec(weight, dims):
    dims = P(*dims[: len(weight.shape)])
    return NamedSharding(mesh, dims if weight.layers is None else P(None, *dims))

replicated = map_tree(lambda w: NamedSharding(mesh, P()), weights)
exact = load_params(open_source(path), weights, replicated, "float32")
total = sum(array.size for _, array in leaves_with_path(exact))
for dims in (P("a"), P(None, "b"), P("b", "a"), P()):
    calls, source = [], Counting()
    shardings = map_tree(lambda w: spec(w, dims), weights)
    params = load_params(source, weights, shardings, "float32", lambda *call: calls.append(call))
    for (name, array), (_, want) in zip(leaves_with_path(params), leaves_with_path(exact)):
        assert np.array_equal(np.asarray(array), np.asarray(want)), (dims, name)
    assert source.numbers == total, (dims, source.numbers, total)
    assert calls[-1][1:] == (4 * total, 4 * total), (dims, calls[-1])
"""


def test_on_eight_devices_every_number_is_read_once_however_it_is_sharded_and_replicated(tiny_model, run_python):
    done = run_python(SHARDED, tiny_model("qwen2", max_shard_size="50KB"), devices=8)
    assert done.returncode == 0, done.stderr


MEMORY = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxtune.hf_io import load_params, open_source
from jaxtune.models.decoder import Model
from jaxtune.models.families import read_config
from jaxtune.models.weights import map_tree

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

path = Path(sys.argv[1])
weights = Model.create(read_config(path)).weights
here = map_tree(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), weights)
jnp.zeros(3).block_until_ready()
before = peak()
params = load_params(open_source(path), weights, here, "float32")
print((peak() - before) / sum(array.nbytes for array in jax.tree.leaves(params)))
"""


def test_the_peak_of_host_memory_is_near_the_size_of_the_model(tmp_path, run_python):
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc, which this system lacks")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "vocab_size": 16384}
    hf = {"model_type": "llama", "num_attention_heads": 8, "max_position_embeddings": 64, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    weights = Model.create(read_config(tmp_path)).weights
    tensors = {key: torch.ones(w.shape) for _, w in leaves_with_path(weights) for key in w.keys}
    save_file(tensors, tmp_path / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) > 200e6
    done = run_python(MEMORY, tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3
