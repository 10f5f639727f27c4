"""What is offloaded lies in the host's memory between steps, and comes to the device no sooner than it is used."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxtune
from jaxtune.config import make_config
from jaxtune.errors import ConfigError
from jaxtune.models.execution import HOST
from jaxtune.parallel.checks import check_offload
from tests.plan.shapes import LARGE
from tests.programs import Stepper
from tests.runs import sections


def argument_bytes(stepper, kind):
    """Of the state, on one device, in this kind of memory, as the compiled step takes it."""
    homes = stepper.compiled.input_shardings[0][0]
    pairs = zip(jax.tree.leaves(stepper.state), jax.tree.leaves(homes), strict=True)
    return sum(x.dtype.itemsize * int(np.prod(h.shard_shape(x.shape))) for x, h in pairs if h.memory_kind == kind)


@pytest.fixture(scope="module")
def plain():
    return Stepper(mesh={"fsdp": 4})


@pytest.mark.parametrize(("what", "parts"), [("params", 1), ("optimizer", 2)])
def test_offloaded_state_is_taken_from_the_hosts_memory_and_from_no_other(plain, what, parts):
    away = Stepper(mesh={"fsdp": 4}, memory={"offload": [what]})
    moved = argument_bytes(away, HOST)
    params = sum(x.nbytes for x in jax.tree.leaves(plain.state["trainable"]))
    assert moved == pytest.approx(parts * params / 4, rel=0.02)  # norms are whole on every device
    assert argument_bytes(plain, HOST) == 0
    assert argument_bytes(plain, "device") - argument_bytes(away, "device") == moved


WAYS = {
    "rows of the embedding": ({"method": "trainable_tokens", "token_indices": [5, 6], "new_tokens": ["<a>"]}, None),
    "what is taken from the weights": ({"method": "pissa", "rank": 4, "targets": ["q_proj"]}, None),
    "a base in int8": ({"method": "lora", "rank": 4, "targets": ["q_proj"]}, "int8"),
    "a base in nf4, merged at the end": ({"method": "layernorm"}, "nf4"),
    "a base in int4, split as it is quantised": (
        {"method": "loftq", "rank": 4, "targets": ["q_proj"], "loftq_bits": 4},
        "int4",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_over_offloaded_weights_begins_and_ends_as_one_over_others(way, tiny_model, tmp_path):
    method, quantize = WAYS[way]

    def run(offload):
        home = tmp_path / str(len(offload))
        more = {"memory": {"offload": offload}, "model": {"quantize": quantize}, "mesh": {"data": 4, "fsdp": 2}}
        rows = jaxtune.train(sections(tiny_model(), home, steps=2, tune=method, **more))
        (file,) = [path for name in ("adapter", "model") for path in (home / "run" / name).glob("*.safetensors")]
        return [row["loss"] for row in rows], load_file(file)

    (expected, tensors), (losses, found) = run([]), run(["params"])
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert found.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_allclose(found[name], tensors[name], atol=1e-4, err_msg=name)


# Steps that do not fit: libtpu then says what they would take, and spares itself the minutes of making their code.
PLANS = """
import json, sys
from jaxtune.config import make_config
from jaxtune.plan.command import plan
from jaxtune.plan.target import choose

target, found = choose("v5e:2x2", None), {}
for name, memory in json.loads(sys.argv[2]).items():
    tree = {"model": {"path": sys.argv[1]}, "tune": {"method": "full"}, "data": {"path": "-", "max_length": 1024}}
    tree |= {"train": {"batch_size": 16}, "mesh": {"fsdp": 4}, "memory": memory}
    made = plan(make_config(tree), target, None)
    assert made.refused
    found[name] = made.memory.peak, made.memory.host
print(json.dumps(found))
"""
KEPT = ["query", "key", "value", "after_attention", "gate", "up"]


@pytest.mark.real
@pytest.mark.slow
def test_each_offload_takes_its_bytes_from_a_tpus_peak(run_python, libtpu, tmp_path):
    layers = 24
    (tmp_path / "config.json").write_text(json.dumps({**LARGE, "num_hidden_layers": layers, "vocab_size": 512}))
    ways = {
        "nothing": {"remat": "block"},
        "optimizer": {"remat": "block", "offload": ["optimizer"]},
        "params": {"remat": "block", "offload": ["params"]},
        "both": {"remat": "block", "offload": ["params", "optimizer"]},
        "names kept": {"remat": KEPT},
        "activations": {"remat": KEPT, "offload": ["activations"]},
    }
    done = run_python(PLANS, tmp_path, json.dumps(ways), env=libtpu, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    peak, host = ({name: numbers[number] for name, numbers in found.items()} for number in (0, 1))
    hidden, inner, heads = LARGE["hidden_size"], LARGE["intermediate_size"], LARGE["num_key_value_heads"] * 128
    params = layers * (2 * hidden * (hidden + heads) + 3 * hidden * inner)  # bytes: four each, on four devices
    assert host["nothing"] == 0
    assert host["optimizer"] == pytest.approx(2 * params, rel=0.01)
    assert host["params"] == pytest.approx(params, rel=0.01)
    assert host["both"] == pytest.approx(3 * params, rel=0.01)
    # A layer's share comes back for its own update, or its own pass, and with offloaded weights their gradients.
    assert peak["nothing"] - peak["optimizer"] > 0.75 * 2 * params
    assert peak["nothing"] - peak["params"] > 0.25 * params
    assert peak["nothing"] - peak["both"] > 0.7 * 3 * params
    assert peak["both"] < peak["optimizer"]
    named = layers * 4 * 1024 * (2 * hidden + 2 * heads + 2 * inner) * 2  # bytes, of four rows in bfloat16
    assert peak["names kept"] - peak["activations"] > 0.75 * named


@pytest.mark.parametrize(
    ("offload", "platform", "version", "refused"),
    [
        (["activations"], "gpu", "0.10.2", "activations"),
        (["optimizer", "params"], "gpu", "0.11.0", "params"),
        (["activations", "params"], "gpu", "0.11.1", None),
        (["optimizer"], "gpu", "0.10.2", None),
        (["activations", "params"], "cpu", "0.10.2", None),
        (["activations"], "tpu", "0.10.2", None),
    ],
)
def test_what_xla_for_gpus_reads_back_in_the_wrong_order_is_refused(offload, platform, version, refused):
    config = make_config({"model": {"path": "-"}, "data": {"path": "-"}, "memory": {"offload": offload}})
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    if refused is None:
        check_offload(config, mesh, version)
        return
    with pytest.raises(ConfigError, match=f"memory.offload: {refused}: on GPUs, jaxlib {version}"):
        check_offload(config, mesh, version)
