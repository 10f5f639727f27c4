"""What `jaxtune quantize` makes of one weight: the tensors of its checkpoint, and the weight that they stand for."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import jaxtune
from jaxtune.errors import ConfigError, ModelError
from jaxtune.quant import gptq_format
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
                f"by {per}; take other --bits"
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


@jax.jit
def _values(found: Rounded) -> jax.Array:
    scales, zeros = (x.astype(jnp.float32)[:, found.groups] for x in (found.scales, found.zeros))
    return scales * (found.codes.astype(jnp.float32) - zeros)
