"""GPTQ and AWQ tensors against the tools' own packing.

The peers are AutoGPTQ 0.7.1 (format v1), GPTQModel 7.7.0 (format v2) and AutoAWQ 0.2.9: `files/` holds weights that
their own code packed, and `weight`, what their own code reads back, in float16. make_tool_files.py wrote them.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune.quant import awq_format, gptq_format
from jaxtune.quant.grouped import Grouped
from jaxtune.quant.packing import BITS, pack, unpack

FILES = Path(__file__).parent / "files"
GPTQ = {"auto_gptq": 1, "gptqmodel": 2}  # file -> version
CASES = [*(f"b{bits}{order}" for bits in BITS for order in ("", "_act_order")), "b4_one_group"]
INPUTS = 64


def tensors(file: str, case: str) -> dict[str, np.ndarray]:
    found = load_file(FILES / f"{file}.safetensors")
    return {key.rpartition(".")[2]: value for key, value in found.items() if key.rpartition(".")[0] == case}


def bits_of(case: str) -> int:
    return int(case[1])


def leaf_of(found: dict[str, np.ndarray], bits: int, version: int) -> Grouped:
    return Grouped(
        jnp.asarray(gptq_format.codes_of(found["qweight"])),
        jnp.asarray(found["scales"].T),
        jnp.asarray(gptq_format.zeros_of(found["qzeros"], bits, version)),
        jnp.asarray(found["g_idx"]),
        bits=bits,
        group=32,
        inputs_in_all=INPUTS,
    )


@pytest.mark.parametrize("file", GPTQ)
@pytest.mark.parametrize("case", CASES)
def test_a_gptq_tools_weight_dequantises_to_the_very_same_numbers(file, case):
    found = tensors(file, case)
    leaf = leaf_of(found, bits_of(case), GPTQ[file])
    # In float32 the product is exact; the tool rounds it to float16.
    np.testing.assert_array_equal(np.asarray(leaf.weight(jnp.float32)).astype(np.float16).T, found["weight"])


@pytest.mark.parametrize("file", GPTQ)
@pytest.mark.parametrize("case", CASES)
def test_packing_again_gives_the_gptq_tools_own_words(file, case):
    found, bits, version = tensors(file, case), bits_of(case), GPTQ[file]
    codes = unpack(gptq_format.codes_of(found["qweight"]), bits)
    zeros = gptq_format.zeros_of(found["qzeros"], bits, version)
    again = gptq_format.to_file(codes, found["scales"].T, zeros, bits, version)
    assert again.keys() == {"qweight", "qzeros", "scales"}
    for name, array in again.items():
        np.testing.assert_array_equal(array, found[name])
        assert array.dtype == found[name].dtype


def test_act_order_stands_in_the_files_and_is_needed():
    found = tensors("gptqmodel", "b4_act_order")
    assert not np.array_equal(found["g_idx"], np.arange(INPUTS) // 32)
    plain = leaf_of({**found, "g_idx": np.arange(INPUTS, dtype=np.int32) // 32}, 4, 2).weight(jnp.float16)
    assert not np.array_equal(np.asarray(plain).T, found["weight"])


def test_the_tools_other_zero_convention_is_another_weight():
    found = tensors("auto_gptq", "b4")
    assert not np.array_equal(np.asarray(leaf_of(found, 4, 2).weight(jnp.float16)).T, found["weight"])


def test_autoawqs_weight_dequantises_to_the_very_same_numbers_and_packs_to_its_words():
    found = load_file(FILES / "autoawq.safetensors")
    codes, zeros = awq_format.by_output(found["qweight"]), awq_format.by_output(found["qzeros"])
    parts = pack(codes, 4), found["scales"].T, zeros
    leaf = Grouped(*map(jnp.asarray, parts), group=32, inputs_in_all=INPUTS)
    np.testing.assert_array_equal(np.asarray(leaf.weight(jnp.float32)).astype(np.float16).T, found["weight"])
    np.testing.assert_array_equal(awq_format.to_file(codes), found["qweight"])
    np.testing.assert_array_equal(awq_format.to_file(zeros), found["qzeros"])


@pytest.mark.parametrize("bits", BITS)
def test_a_stream_gives_its_codes_back_from_numpy_and_from_jax(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 48), dtype=np.uint8)
    stream = pack(codes, bits)
    assert stream.shape == (3, 48 * bits // 8)
    # The reference writes the bits out one by one.
    text = "".join(f"{value:0{bits}b}"[::-1] for value in codes[0])
    np.testing.assert_array_equal(stream[0], [int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)])
    np.testing.assert_array_equal(unpack(stream, bits), codes)
    np.testing.assert_array_equal(np.asarray(unpack(jnp.asarray(stream), bits)), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_of_0_survives_the_v1_convention(bits):
    codes, scales = np.zeros((32, 32), np.uint8), np.ones((32, 1), np.float16)
    zeros = (np.arange(32) % 2**bits).astype(np.uint8)[:, None]
    words = gptq_format.to_file(codes, scales, zeros, bits, 1)["qzeros"]
    np.testing.assert_array_equal(gptq_format.zeros_of(words, bits, 1), zeros)
