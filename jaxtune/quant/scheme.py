"""How a model's linear maps are quantised, if they are: as they are loaded, or by the checkpoint that they are in."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config import ModelSection
from jaxtune.errors import ConfigError
from jaxtune.leaves import Leaf
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import Weight
from jaxtune.parallel import local
from jaxtune.quant import four_bit, int8
from jaxtune.quant.checkpoints import Format, Stored, Tensors, format_of
from jaxtune.quant.leaf import Quantized, ShardingOf, placed


@dataclass(frozen=True)
class AtLoad:
    """model.quantize: each weight is quantised as soon as it is there."""

    kind: str  # nf4 | fp4 | int8 | int4
    double: bool = False

    @property
    def name(self) -> str:
        return f"model.quantize: {self.kind}"

    def quantized(self, w_LOI: jax.Array) -> Quantized:
        """The leaf of a stack of weights, made layer by layer."""
        return jax.lax.map(self.layer, w_LOI)

    def layer(self, w_OI: jax.Array) -> Quantized:
        """The leaf of one layer's weight, which may lie in the host's memory."""
        return _quantized(local.near(w_OI), self.kind, self.double)


def _quantized(w: jax.Array, kind: str, double: bool) -> Quantized:
    if kind == "int8":
        return int8.quantize(w)
    if kind == "int4":
        blocks, size = four_bit.quantize_int4(w), four_bit.piece_of(w.shape[1], four_bit.GROUP)
        return four_bit.from_blocks(blocks, w.shape, kind, size)
    return four_bit.from_blocks(four_bit.quantize(w, kind, double), w.shape, kind)


@lru_cache(64)
def _maker(scheme: AtLoad, where: Quantized) -> Any:
    """`quantized` under jit; weights of one shape that lie alike are compiled for once."""
    return jax.jit(scheme.quantized, out_shardings=where)


Scheme = AtLoad | Format


def scheme_of(section: ModelSection, config: ModelConfig, where: str) -> Scheme | None:
    """What the configuration and the model's own quantization_config say together.

    Raises:
        ConfigError: they contradict each other.
        ModelError: the model is quantised in a way that is not read.
    """
    settings = config.hf.get("quantization_config")
    if settings is None:
        return AtLoad(section.quantize, section.double_quant) if section.quantize else None
    if section.init == "random":
        raise ConfigError(
            f"model.init random: {where} is a quantised model, which has no first values; take the config.json of "
            "the model that it was made from, and model.quantize"
        )
    stored = format_of(settings, where)
    asked = (section.quantize, section.double_quant)
    if section.quantize and asked != (stored.kind, stored.double):
        raise ConfigError(
            f"model.quantize {section.quantize}, double_quant {str(section.double_quant).lower()}: {where} is "
            f"quantised already, as {stored.name}, and is read as it is; leave both out"
        )
    return stored


Own = Callable[[Weight, AtLoad], Callable | None]


def shapes_of(
    scheme: Scheme | None,
    weight: Weight,
    dtype: Any,
    own: Own = lambda weight, scheme: None,
    tensors: Tensors | None = None,
) -> Any:
    """What a weight becomes, as shapes, from its declaration alone: a leaf, or an array in `dtype`.

    tensors: of the checkpoint that it lies in, which say more than the settings do.
    """
    array = jax.ShapeDtypeStruct(weight.full_shape, jnp.dtype(dtype))
    if scheme is None or not weight.is_linear:
        return array
    if not isinstance(scheme, AtLoad):
        held = scheme.stored(weight, tensors)
        return array if held is None else held.leaf
    if scheme.kind != "int8":
        four_bit.check_shape(weight.shape, weight.key)
    return jax.eval_shape(own(weight, scheme) or scheme.quantized, array)


@dataclass(frozen=True)
class Quantizer:
    """A scheme, and where the parts of its leaves lie.

    own: (weight, scheme) -> what makes a leaf of the weight in the tuning method's own way; None: there is none.
    dtype: of the weights that are quantised, before they are: rounded to fewer bits first, they have other codes. None:
    that of the others.
    """

    scheme: Scheme | None
    sharding_of: ShardingOf
    own: Own = lambda weight, scheme: None
    dtype: Any = None

    def quantises(self, weight: Weight) -> bool:
        """Whether a weight is quantised once it is there."""
        return isinstance(self.scheme, AtLoad) and weight.is_linear

    def type_of(self, weight: Weight, dtype: Any) -> Any:
        """The type to read or draw a weight in. dtype: of those that stay as they are."""
        return self.dtype if self.dtype is not None and self.quantises(weight) else dtype

    def shape(self, weight: Weight, shape: jax.ShapeDtypeStruct, tensors: Tensors | None = None) -> Any:
        """What a weight becomes, as shapes with shardings. shape: of the weight itself, with its own. tensors: as
        shapes_of has them."""
        leaf = shapes_of(self.scheme, weight, self.type_of(weight, shape.dtype), self.own, tensors)
        return placed(leaf, weight, self.sharding_of) if isinstance(leaf, Leaf) else shape

    def stored(self, weight: Weight, tensors: Tensors) -> Stored | None:
        """How a checkpoint holds a weight; None: as a plain tensor. The shapes of its leaf have shardings."""
        if self.scheme is None or isinstance(self.scheme, AtLoad) or not weight.is_linear:
            return None
        held = self.scheme.stored(weight, tensors)
        return held and replace(held, leaf=placed(held.leaf, weight, self.sharding_of))  # type: ignore[arg-type]

    def loaded(self, weight: Weight, array: jax.Array) -> Any:
        """A weight that has just been read or drawn, quantised if it is to be: then the array is given up."""
        if not self.quantises(weight):
            return array
        assert isinstance(self.scheme, AtLoad)
        leaf, own = shapes_of(self.scheme, weight, array.dtype, self.own), self.own(weight, self.scheme)
        where = jax.tree.map(lambda part: part.sharding, placed(leaf, weight, self.sharding_of))
        made = (jax.jit(own, out_shardings=where) if own else _maker(self.scheme, where))(array)
        jax.block_until_ready(made)
        array.delete()
        return made


PLAIN = Quantizer(None, lambda shape, axes: None)  # nothing is quantised
