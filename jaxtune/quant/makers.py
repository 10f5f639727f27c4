"""What `jaxtune quantize` makes of one weight: the tensors of its checkpoint, and the weight that they stand for."""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import jaxtune
from jaxtune.eight_bit import dynamic_codes
from jaxtune.errors import ConfigError, ModelError
from jaxtune.quant import four_bit, gptq_format, int8
from jaxtune.quant.gptq import Rounded, gptq, round_to_nearest
from jaxtune.quant.grouped_files import WORD


class Maker(Protocol):
    """A kind of checkpoint."""

    @property
    def needs_inputs(self) -> bool:
        """Whether `make` takes X^T X of a weight's inputs."""
        ...

    def check(self, key: str, shape: tuple[int, ...]) -> None:
        """Raises ModelError: a weight of this shape cannot be held."""
        ...

    def make(self, key: str, weight: jax.Array, gram: jax.Array | None) -> tuple[dict[str, np.ndarray], jax.Array]:
        """(tensors of the file, by key; the float32 weight [out, in] that they stand for)."""
        ...

    def settings(self) -> dict[str, Any]:
        """quantization_config of config.json."""
        ...


@dataclass(frozen=True)
class GroupedMaker:
    """GPTQ's files, of format v1, which every reader knows. damp: None: by rounding, without GPTQ.

    group: inputs that share a grid; -1: all. symmetric: the grids are symmetric around 0.
    """

    bits: int
    group: int
    damp: float | None
    act_order: bool
    symmetric: bool

    @property
    def needs_inputs(self) -> bool:
        return self.damp is not None

    def check(self, key: str, shape: tuple[int, ...]) -> None:
        outputs, inputs = shape
        per = WORD // self.bits if WORD % self.bits == 0 else WORD
        if outputs % per or inputs % per:
            raise ModelError(
                f"{key}: [{outputs}, {inputs}] does not fill whole words with {self.bits} bits: both must be divisible "
                f"by {per}; take another number of bits"
            )
        if self.group != -1 and inputs % self.group:
            fit = [size for size in (16, 32, 64, 128, 256, 512, 1024) if inputs % size == 0]
            allowed = ", ".join(map(str, [-1, *fit]))
            raise ConfigError(
                f"--group-size {self.group} does not divide the {inputs} inputs of {key}; allowed: {allowed}"
            )

    def make(self, key: str, weight: jax.Array, gram: jax.Array | None) -> tuple[dict[str, np.ndarray], jax.Array]:
        inputs = weight.shape[1]
        grid: dict[str, Any] = {"bits": self.bits, "group": inputs if self.group == -1 else self.group}
        grid["symmetric"] = self.symmetric
        if gram is None:
            found = round_to_nearest(weight, **grid)
        else:
            found = gptq(weight, gram, self.damp, act_order=self.act_order, **grid)
            if bool(jnp.isnan(found.scales).any()):
                raise ModelError(
                    f"{key}: the Hessian of its inputs is not positive definite; give more data, or more --damp"
                )
        module = key.removesuffix(".weight")
        codes, scales, zeros = (np.asarray(x) for x in (found.codes, found.scales, found.zeros))
        tensors = gptq_format.to_file(codes, scales, zeros, self.bits, version=1) | {"g_idx": np.asarray(found.groups)}
        return {f"{module}.{name}": array for name, array in tensors.items()}, _values(found)

    def settings(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "desc_act": self.act_order,
            "sym": self.symmetric,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "lm_head": False,
            "true_sequential": True,
            "static_groups": False,
            **({} if self.damp is None else {"damp_percent": self.damp}),
            "meta": {"quantizer": [f"jaxtune:{jaxtune.__version__}"]},
        }


@dataclass(frozen=True)
class FourBitMaker:
    """bitsandbytes' files in 4 bits. double: the scales are quantised too. kind: nf4 | fp4. block: numbers that share
    a scale."""

    double: bool
    kind: str = "nf4"
    block: int = four_bit.BLOCK
    needs_inputs: bool = False

    def check(self, key: str, shape: tuple[int, ...]) -> None:
        four_bit.check_shape(shape, key)

    def make(self, key: str, weight: jax.Array, gram: jax.Array | None) -> tuple[dict[str, np.ndarray], jax.Array]:
        blocks, values = _four_bits(weight, self.kind, self.double, self.block)
        state: dict[str, Any] = {"quant_type": self.kind, "blocksize": self.block, "dtype": "float32"}
        state["shape"] = list(weight.shape)
        tensors = {"absmax": np.asarray(blocks.absmax), "quant_map": four_bit.CODES[self.kind]}
        if self.double:
            state |= {"nested_blocksize": four_bit.NESTED_BLOCK, "nested_dtype": "float32"}
            state["nested_offset"] = float(blocks.offset)
            tensors |= {"nested_absmax": np.asarray(blocks.nested), "nested_quant_map": dynamic_codes(signed=True)}
        packed = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors[f"quant_state.bitsandbytes__{self.kind}"] = packed
        return {key: np.asarray(blocks.packed)[:, None]} | {f"{key}.{n}": x for n, x in tensors.items()}, values

    def settings(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.double,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
        }


@dataclass(frozen=True)
class Int8Maker:
    """bitsandbytes' files in 8 bits, of LLM.int8."""

    needs_inputs: bool = False

    def check(self, key: str, shape: tuple[int, ...]) -> None:
        """Any shape will do."""

    def make(self, key: str, weight: jax.Array, gram: jax.Array | None) -> tuple[dict[str, np.ndarray], jax.Array]:
        leaf, values = _eight_bits(weight)
        module = key.removesuffix(".weight")
        beside = {f"{module}.SCB": np.asarray(leaf.scales), f"{module}.weight_format": np.array(0, np.uint8)}
        return {key: np.asarray(leaf.codes)} | beside, values

    def settings(self) -> dict[str, Any]:
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}


@partial(jax.jit, static_argnums=(1, 2, 3))
def _four_bits(weight: jax.Array, kind: str, double: bool, block: int) -> tuple[four_bit.Blocks, jax.Array]:
    blocks = four_bit.quantize(weight, kind, double, block)
    return blocks, four_bit.from_blocks(blocks, weight.shape, kind, block).weight(jnp.float32)


@jax.jit
def _eight_bits(weight: jax.Array) -> tuple[int8.Int8, jax.Array]:
    leaf = int8.quantize(weight)
    return leaf, leaf.weight(jnp.float32)


@jax.jit
def _values(found: Rounded) -> jax.Array:
    scales, zeros = (x.astype(jnp.float32)[:, found.groups] for x in (found.scales, found.zeros))
    return scales * (found.codes.astype(jnp.float32) - zeros)
