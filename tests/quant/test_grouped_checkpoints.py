"""Ready-made GPTQ and AWQ checkpoints: their logits are those of the dense model that they stand for.

The reference is the dense model, and the packing of tests/quant/checkpoints.py, which test_tool_files.py's tools agree
with (test_the_reference_packs_and_reads_as_the_tools_do).
"""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.assemble import Source, assemble
from jaxtune.config import ModelSection, make_config
from jaxtune.errors import ModelError
from jaxtune.hf_io import open_source
from jaxtune.mesh import make_mesh
from jaxtune.models.decoder import Model
from jaxtune.models.execution import Execution
from jaxtune.program import build
from tests.programs import Stepper, defaults
from tests.quant import checkpoints
from tests.quant.test_tool_files import FILES, GPTQ, tensors

TOKENS = np.random.default_rng(0).integers(0, 384, (2, 24))
GPTQ_4 = {"bits": 4, "group_size": 32, "desc_act": False}


def logits(path, **options) -> np.ndarray:
    return jaxtune.load_model(path, **options).logits(TOKENS)


@pytest.fixture(scope="module")
def write(tiny_model, tmp_path_factory):
    """write(method, settings, **options) -> (checkpoint, dense model), once for the same ones."""
    made = {}

    def make(method: str, settings: dict, family: str = "llama", **options):
        name = f"{family} {method} {sorted(settings.items())} {sorted(options.items())}"
        if name not in made:
            home = tmp_path_factory.mktemp(method)
            made[name] = checkpoints.write(tiny_model(family), home, method, settings, **options)
        return made[name]

    return make


CASES = {
    "gptq 4 bits": ("gptq", GPTQ_4, {}),
    "gptq 4 bits, no g_idx": ("gptq", GPTQ_4, {"with_groups": False}),
    "gptq v2, asymmetric": ("gptq", {**GPTQ_4, "checkpoint_format": "gptq_v2"}, {"version": 2, "symmetric": False}),
    "gptq act-order": ("gptq", {**GPTQ_4, "desc_act": True}, {"act_order": True}),
    "gptq 2 bits": ("gptq", {**GPTQ_4, "bits": 2}, {"bits": 2}),
    "gptq 3 bits, one group": ("gptq", {"bits": 3, "group_size": -1}, {"bits": 3, "size": -1, "symmetric": False}),
    "gptq 8 bits, ragged groups": ("gptq", {**GPTQ_4, "bits": 8, "group_size": 40}, {"bits": 8, "size": 40}),
    "awq": ("awq", {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, {"symmetric": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dense_model(write, case):
    method, settings, options = CASES[case]
    packed, dense = write(method, settings, **options)
    expected = logits(dense)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(packed), expected, atol=1e-4)


@pytest.mark.parametrize("mesh", [None, {"tensor": 2}], ids=str)
def test_outputs_need_not_fill_32_zeros(tiny_model, tmp_path, mesh):
    """48 of them: six words of zeros, and along tensor 2 three for each device."""
    model = tiny_model("llama", hidden_size=48, head_dim=16)
    packed, dense = checkpoints.write(model, tmp_path, "gptq", {"bits": 4, "group_size": 16}, size=16, symmetric=False)
    np.testing.assert_allclose(logits(packed, mesh=mesh), logits(dense), atol=1e-4)


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("gptq act-order", {"tensor": 2, "fsdp": 4}),
        ("gptq 4 bits", {"tensor": 4, "fsdp": 2}),
        ("gptq 8 bits, ragged groups", {"tensor": 2, "fsdp": 4}),
        ("awq", {"fsdp": 8}),
    ],
    ids=str,
)
def test_logits_are_the_same_in_parts(write, case, mesh):
    """Groups of 32 in 64 or 96 inputs: along tensor 4, a device's 16 or 24 inputs are no whole groups."""
    method, settings, options = CASES[case]
    packed, _ = write(method, settings, **options)
    np.testing.assert_allclose(logits(packed, mesh=mesh), logits(packed), atol=1e-4)


def test_parts_of_the_weights_lie_on_the_devices(write):
    packed, _ = write("gptq", {**GPTQ_4, "desc_act": True}, act_order=True)
    layer = jaxtune.load_model(packed, mesh={"tensor": 2, "fsdp": 4}).params["stacks"]["0"]["mlp"]
    shards = lambda array: array.sharding.shard_shape(array.shape)  # noqa: E731
    down, up = layer["down_proj"]["weight"], layer["up_proj"]["weight"]
    assert down.codes.dtype == np.uint8
    assert [shards(part) for part in (down.codes, down.scales, down.groups)] == [(2, 16, 24), (2, 16, 3), (2, 48)]
    assert [shards(part) for part in (up.codes, up.scales, up.groups)] == [(2, 48, 8), (2, 12, 2), (2, 16)]


def test_older_files_and_other_names_of_the_settings_are_read(write):
    packed, dense = write(
        "gptq", {"wbits": 4, "q_group_size": 32, "format": "GPTQ".lower()}, file="quantize_config.json"
    )
    np.testing.assert_allclose(logits(packed), logits(dense), atol=1e-4)


def test_a_bias_of_zeros_that_the_model_has_not_is_left_out(write, tmp_path):
    packed, dense = write("gptq", GPTQ_4)
    again = copied(packed, tmp_path, **{"model.layers.0.mlp.up_proj.bias": np.zeros(96, np.float16)})
    np.testing.assert_allclose(logits(again), logits(dense), atol=1e-4)
    with pytest.raises(ModelError, match=r"unknown weights \(1\): model.layers.0.mlp.up_proj.bias"):
        logits(copied(packed, tmp_path / "2", **{"model.layers.0.mlp.up_proj.bias": np.ones(96, np.float16)}))


def copied(packed, home, settings=None, **arrays):
    """The checkpoint with other settings or tensors."""
    home.mkdir(exist_ok=True)
    shutil.copytree(packed, home / "copy")
    if arrays:
        found = load_file(packed / "model.safetensors") | arrays
        save_file({key: value for key, value in found.items() if value is not None}, home / "copy/model.safetensors")
    if settings:
        config = json.loads((packed / "config.json").read_text())
        config["quantization_config"] |= settings
        (home / "copy" / "config.json").write_text(json.dumps(config))
    return home / "copy"


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("gptq", {"bits": 5}, "bits is 5; allowed: 2, 3, 4, 8"),
        ("gptq", {"group_size": 0}, "group_size is 0; allowed: -1"),
        ("gptq", {"wbits": 8}, "bits and wbits are one setting and disagree"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported: gptq, gptq_v2"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic is .*not supported"),
        ("gptq", {"lm_head": True}, "lm_head is True; not supported; allowed: False"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype is 'int16'; not supported; allowed: 'int32'"),
        ("gptq", {"new_thing": 1}, "new_thing is 1; it may change what the model computes"),
        ("gptq", {"quant_method": "gbtq"}, "quant_method is 'gbtq'.*did you mean .*gptq"),
        ("awq", {"version": "gemv"}, "version is 'gemv'; supported: gemm"),
        ("awq", {"zero_point": False}, "zero_point is False"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(write, tmp_path, method, settings, message):
    packed, _ = write(
        *(CASES["awq"][:2] if method == "awq" else ("gptq", GPTQ_4)), **CASES["awq"][2] if method == "awq" else {}
    )
    with pytest.raises(ModelError, match=message):
        logits(copied(packed, tmp_path, settings))


def test_tensors_that_do_not_fit_the_settings_are_refused_by_name(write, tmp_path):
    packed, _ = write("gptq", GPTQ_4)
    with pytest.raises(
        ModelError, match=r"weights of another shape.*proj.scales is \[[23], \d+\], expected \[[46], \d+\]"
    ):
        logits(copied(packed, tmp_path, {"group_size": 16}))
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(ModelError, match=f"missing weights .*{name}.qzeros"):
        logits(copied(packed, tmp_path / "2", **{f"{name}.qzeros": None}))
    far = np.full(96, 3, np.int32)
    with pytest.raises(ModelError, match=f"{name}.g_idx names groups 3 to 3 of 3"):
        logits(copied(packed, tmp_path / "3", **{f"{name}.g_idx": far}))


class OverFiles(Stepper):
    """The step of LoRA over a model on the disk."""

    def __init__(self, path, **mesh):
        tune = {"method": "lora", "rank": 4, "targets": ["q_proj", "down_proj"]}
        self.config = make_config(
            {"model": {"path": str(path)}, "data": {"path": "-"}, **defaults({"tune": tune, "mesh": mesh})}
        )
        source = Source.open(self.config.model)
        mesh = make_mesh(self.config.mesh, jax.devices()[: math.prod(mesh.values())])
        made = assemble(source, self.config.tune, mesh, execution=Execution.of(self.config, np.float32))
        self.rows, self.time, self.vocab = 16, 32, source.config.vocab_size
        self.model = made.model
        self.program = build(self.config, made.model, made.mesh, made.params, made.mask, 3)
        self.state, self.frozen = self.program.state, self.program.frozen


def test_lora_over_a_gptq_base_has_the_dense_models_losses_on_one_device_and_on_eight(write):
    packed, dense = write("gptq", {**GPTQ_4, "desc_act": True}, act_order=True)
    alone = OverFiles(packed, fsdp=1)
    losses = alone.run(3)
    assert len(set(losses)) == 3
    np.testing.assert_allclose(OverFiles(packed, fsdp=4, tensor=2).run(3), losses, atol=2e-5)
    np.testing.assert_allclose(OverFiles(dense, fsdp=1).run(3), losses, atol=2e-5)
    codes = alone.frozen["stacks"]["0"]["mlp"]["down_proj"]["weight"].base.codes
    assert codes.dtype == np.uint8
    assert codes.shape == (2, 64, 48)


@pytest.mark.parametrize("file", GPTQ)
@pytest.mark.parametrize("case", ["b3_act_order", "b4_act_order"])
def test_the_reference_packs_and_reads_as_the_tools_do(file, case):
    found, bits = tensors(file, case), int(case[1])
    for array in (found["qweight"].T, found["qzeros"]):
        np.testing.assert_array_equal(checkpoints.words(checkpoints.numbers(array, bits), bits), array)
    dense = checkpoints.dequantised(found, bits, GPTQ[file])
    np.testing.assert_array_equal(dense.astype(np.float16).T, found["weight"])


def test_the_reference_packs_as_autoawq_does():
    found = load_file(FILES / "autoawq.safetensors")
    scales = found["scales"].T.astype(np.float32)
    zeros = np.array(
        [[word >> 4 * i & 15 for word in row for i in (0, 4, 1, 5, 2, 6, 3, 7)] for row in found["qzeros"]]
    ).T
    spread = lambda x: np.repeat(x, 32, axis=1)  # noqa: E731
    codes = np.round(found["weight"].T.astype(np.float32) / spread(scales)).astype(int) + spread(zeros)
    for name, array in checkpoints.awq_tensors(codes, found["scales"].T, zeros).items():
        np.testing.assert_array_equal(array, found[name])


@pytest.mark.parametrize("case", ["gptq act-order", "gptq 3 bits, one group", "awq"])
def test_the_plan_knows_the_weights_from_the_settings_alone(write, case):
    method, settings, options = CASES[case]
    packed, _ = write(method, settings, **options)
    source = Source.open(ModelSection(path=str(packed)))
    weights = Model.create(source.config).weights["stacks"]["0"]
    for weight in (weights["attention"]["k_proj"]["weight"], weights["mlp"]["down_proj"]["weight"]):
        known, found = (source.scheme.stored(weight, tensors).leaf for tensors in (None, open_source(packed)))
        assert known == found


NAMED = [[f"self_attn.{name}_proj" for name in "qkvo"], ["mlp.up_proj", "mlp.gate_proj"]]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gptq", {**GPTQ_4, "modules_in_block_to_quantize": NAMED}),
        ("awq", {**CASES["awq"][1], "modules_to_not_convert": ["down_proj"]}),
    ],
    ids=["gptq", "awq"],
)
def test_a_map_that_the_settings_leave_out_is_a_plain_one_in_a_plan_and_in_the_file(write, method, settings):
    packed, dense = write(method, settings, plain="down_proj")
    source = Source.open(ModelSection(path=str(packed)))
    mlp = Model.create(source.config).weights["stacks"]["0"]["mlp"]
    for files in (None, source.quantized):
        held = {name: source.scheme.stored(mlp[name]["weight"], files) for name in ("up_proj", "down_proj")}
        assert held["up_proj"] is not None and held["down_proj"] is None
    np.testing.assert_allclose(logits(packed), logits(dense), atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_of_v2_in_a_file_that_calls_itself_v1_are_refused(write, tmp_path, bits):
    settings = {"bits": bits, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"}
    packed, dense = write("gptq", settings, bits=bits, version=2)
    np.testing.assert_allclose(logits(packed), logits(dense), atol=1e-4)
    middle = 2 ** (bits - 1)
    with pytest.raises(ModelError, match=rf"proj.qzeros: every zero is stored as {middle}; .* has {middle - 1}; set"):
        logits(copied(packed, tmp_path, {"checkpoint_format": "gptq"}))
