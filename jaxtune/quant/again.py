"""A merged model quantised once more, as its base is: which kinds of checkpoint are written, and the writing.

GPTQ's files are made by rounding to the nearest point of the base's kind of grid: no calibration data, groups of inputs
one after another. int4 of model.quantize is that grid too, with scales in float32, so it becomes GPTQ's files.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.hf_write import as_type, config_json
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import Tree, Weight, leaves_with_path, set_path
from jaxtune.quant.bitsandbytes import EightBitFormat, FourBitFormat
from jaxtune.quant.checkpoints import Tensors
from jaxtune.quant.four_bit import GROUP
from jaxtune.quant.gptq_format import GPTQFormat
from jaxtune.quant.makers import FourBitMaker, GroupedMaker, Int8Maker, Maker
from jaxtune.quant.scheme import AtLoad, Scheme
from jaxtune.quant.write import ShardWriter, checkpoint_directory

WRITTEN = "nf4, fp4 and int8 (bitsandbytes' files), int4 and gptq (GPTQ's)"
# Settings of the base that say which modules are quantised: the same ones are again.
NAMING = ("modules_in_block_to_quantize", "llm_int8_skip_modules")


def makers_of(scheme: Scheme, settings: Mapping[str, Any], weights: Tree, tensors: Tensors) -> dict[str, Maker]:
    """The key of each weight that is quantised in the base -> what makes it again.

    settings: the base's quantization_config; weights: the base's declarations; tensors: its files.

    Raises:
        ConfigError: no checkpoint of this kind is written.
        ModelError: a weight does not fit into one.
    """
    linear = [weight for _, weight in leaves_with_path(weights) if weight.is_linear]
    group = math.gcd(GROUP, *(weight.shape[1] for weight in linear))
    found: dict[str, Maker] = {}
    for weight in linear:
        maker = _maker(scheme, settings, weight, tensors, group)
        if maker is not None:
            if isinstance(scheme, AtLoad):  # a checkpoint's weights fit into one
                maker.check(weight.keys[0], weight.shape)
            found |= dict.fromkeys(weight.keys, maker)
    if not found:
        raise ConfigError(f"onto quantized: no weight of the base, {scheme.name}, is quantised; take dequantized")
    return found


def _maker(scheme: Scheme, settings: Mapping[str, Any], weight: Weight, tensors: Tensors, group: int) -> Maker | None:
    """None: the weight is not quantised. group: inputs with one scale where `scheme` is int4."""
    if isinstance(scheme, AtLoad):
        if scheme.kind == "int4":
            return GroupedMaker(4, group, None, act_order=False, symmetric=True)
        return Int8Maker() if scheme.kind == "int8" else FourBitMaker(scheme.double, scheme.kind)
    held = scheme.stored(weight, tensors)
    if held is None:
        return None
    if isinstance(scheme, FourBitFormat):
        return FourBitMaker(scheme.double, scheme.kind, held.leaf.block)  # type: ignore[attr-defined]
    if isinstance(scheme, EightBitFormat):
        return Int8Maker()
    if isinstance(scheme, GPTQFormat):
        return GroupedMaker(scheme.bits, scheme.size, None, act_order=False, symmetric=settings.get("sym") is not False)
    raise ConfigError(
        f"onto quantized: the base is {scheme.name}, and such checkpoints are not written; those that are: {WRITTEN}; "
        "take onto original or dequantized"
    )


def write_quantized(
    directory: Path,
    params: Tree,
    weights: Tree,
    config: ModelConfig,
    source: Path,
    dtype: str,
    makers: dict[str, Maker],
    settings: Mapping[str, Any],
    tokenizer: Any = None,
) -> Tree:
    """Write merged parameters, those that have a maker quantised and the others in `dtype`; the tree of the weights
    that what was written stands for.

    params: arrays in the structure of `weights`. settings: the base's quantization_config. The others are as in
    write_model.
    """
    own = next(iter(makers.values())).settings()
    own |= {name: settings[name] for name in NAMING if settings.get(name) is not None}
    leaves, kind = dict(leaves_with_path(params)), jnp.dtype(dtype)
    result: Tree = {}
    num_bytes = sum(kind.itemsize * int(np.prod(weight.full_shape)) for _, weight in leaves_with_path(weights))
    hf = config_json(config, kind.name)
    with checkpoint_directory(directory, source, config, hf, own, num_bytes, tokenizer) as partial:
        writer = ShardWriter(partial)
        for path, weight in leaves_with_path(weights):
            rows = leaves[path][None] if weight.layers is None else leaves[path]
            values = [_add(writer, makers, key, row, kind) for key, row in zip(weight.keys, rows, strict=True)]
            set_path(result, path, values[0] if weight.layers is None else jnp.stack(values))
        writer.close()
    return result


def _add(writer: ShardWriter, makers: dict[str, Maker], key: str, weight: jax.Array, dtype: Any) -> jax.Array:
    """Put one layer's weight into the files; what it stands for there, in float32."""
    if key not in makers:
        plain = as_type(key, np.asarray(weight), dtype)
        writer.add({key: plain})
        return jnp.asarray(plain, jnp.float32)
    tensors, values = makers[key].make(key, weight.astype(jnp.float32), None)
    writer.add(tensors)
    return values
