"""Bottleneck adapters: a narrow two-layer network beside or behind parts of each layer, in three arrangements.

The computation, the options and the files are those of AdapterHub's library `adapters`, so that either reads what the
other wrote. No weight can take them up: they are not merged.

Legend: B batch, T time, E hidden size, R the bottleneck's width.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from jaxtune import ops
from jaxtune.errors import AdapterError, ConfigError
from jaxtune.models.config import ModelConfig
from jaxtune.models.hooks import Hooks
from jaxtune.models.weights import HOOKS, Path, Tree, Weight, map_tree, path_key, set_path
from jaxtune.ops import Noise
from jaxtune.section import Adapting, Fraction, NonNegative, PositiveFloat
from jaxtune.tune.method import EMBEDDING, Method, ShardingOf, declared, get_path, is_abstract, make
from jaxtune.tune.peft_files import Entry, Files

NON_LINEARITIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "swish": jax.nn.silu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "leakyrelu": jax.nn.leaky_relu,
    "tanh": jnp.tanh,
}


class Bottleneck(Adapting):
    """Options of bottleneck adapters, named as AdapterHub's configurations name them."""

    reduction_factor: PositiveFloat = 16  # hidden size over the bottleneck's width
    non_linearity: Literal["relu", "swish", "silu", "gelu", "gelu_new", "leakyrelu", "tanh"] = "relu"
    scaling: PositiveFloat | Literal["learned", "channel"] = 1.0  # of what is added; learned: one number or by channel
    dropout: Fraction = 0.0  # on what is added
    init_weights: Literal["bert", "mam_adapter", "houlsby"] = "bert"  # mam_adapter: what is added starts at zero
    leave_out: list[NonNegative] = []  # layers without adapters, counted from 0
    name: Annotated[str, Field(pattern=r"^[^.{}]+$")] = "default"  # of the adapter in its files


class HoulsbySection(Bottleneck):
    """An adapter behind attention and one behind the MLP of each layer (Houlsby et al. 2019, arXiv 1902.00751)."""

    method: Literal["houlsby"] = "houlsby"
    non_linearity: Literal["relu", "swish", "silu", "gelu", "gelu_new", "leakyrelu", "tanh"] = "swish"


class PfeifferSection(Bottleneck):
    """An adapter at the end of each layer (Pfeiffer et al. 2020, arXiv 2005.00247)."""

    method: Literal["pfeiffer"] = "pfeiffer"


class ParallelSection(Bottleneck):
    """An adapter beside the MLP of each layer (He et al. 2021, arXiv 2110.04366)."""

    method: Literal["parallel"] = "parallel"
    reduction_factor: PositiveFloat = 2
    scaling: PositiveFloat | Literal["learned", "channel"] = 4.0
    init_weights: Literal["bert", "mam_adapter", "houlsby"] = "mam_adapter"


ATTENTION, OUTPUT = "attention_adapters", "output_adapters"  # places, as the library names its modules
PLACES = {"houlsby": (ATTENTION, OUTPUT), "pfeiffer": (OUTPUT,), "parallel": (OUTPUT,)}


@dataclass(frozen=True)
class BottleneckHooks(Hooks):
    """What an adapter takes: houlsby the output y of what it stands behind, pfeiffer y with the residual stream added,
    parallel the residual stream alone. What it gives is added to y. The library's forward pass of a Llama, where
    every norm comes before the part that it is for."""

    method: str
    width: int
    non_linearity: str
    scaling: float | str
    dropout: float
    name: str

    def layer(self, config: ModelConfig) -> Tree:
        return {place: self._adapter(place, config.hidden_size) for place in PLACES[self.method]}

    def _adapter(self, place: str, hidden: int) -> Tree:
        start = f"model.layers.{{layer}}.{place}.adapters.{self.name}."
        weights = {
            "down": Weight((self.width, hidden), (None, "embed"), start + "adapter_down.0.weight"),
            "down_bias": Weight((self.width,), (None,), start + "adapter_down.0.bias"),
            "up": Weight((hidden, self.width), ("embed", None), start + "adapter_up.weight"),
            "up_bias": Weight((hidden,), (None,), start + "adapter_up.bias"),
        }
        if isinstance(self.scaling, str):
            weights["scaling"] = Weight((1 if self.scaling == "learned" else hidden,), (None,), start + "scaling")
        return weights

    def attention_output(self, own: Tree, residual_BTE: Any, normed_BTE: Any, y_BTE: Any, noise: Noise | None) -> Any:
        return self._added(own, ATTENTION, residual_BTE, y_BTE, noise)

    def mlp_output(self, own: Tree, residual_BTE: Any, normed_BTE: Any, y_BTE: Any, noise: Noise | None) -> Any:
        return self._added(own, OUTPUT, residual_BTE, y_BTE, noise)

    def _added(self, own: Tree, place: str, residual_BTE: Any, y_BTE: Any, noise: Noise | None) -> Any:
        if place not in own:
            return y_BTE
        taken = {"houlsby": y_BTE, "pfeiffer": residual_BTE + y_BTE, "parallel": residual_BTE}[self.method]
        weights = {name: array.astype(y_BTE.dtype) for name, array in own[place].items()}
        low_BTR = NON_LINEARITIES[self.non_linearity](ops.linear(taken, weights["down"]) + weights["down_bias"])
        return y_BTE + ops.dropout(self._raised(low_BTR, weights), self.dropout, noise)

    def _raised(self, low_BTR: Any, weights: Tree) -> Any:
        """Back to the hidden size, scaled. A constant scales both terms before they are a sum: XLA for GPUs took a
        sum's factor for that of its product alone (xla issue 46110, jaxlib before 0.11.1)."""
        up, bias = weights["up"], weights["up_bias"]
        if "scaling" in weights:
            return (ops.linear(low_BTR, up) + bias) * weights["scaling"]
        return ops.linear(low_BTR * self.scaling, up) + bias * self.scaling


def hooks(section: Bottleneck, config: ModelConfig) -> BottleneckHooks:
    width = max(1, int(config.hidden_size // section.reduction_factor))
    return BottleneckHooks(section.method, width, section.non_linearity, section.scaling, section.dropout, section.name)


def _own(weights: Tree) -> Iterator[tuple[Path, Weight]]:
    """The adapters' declarations."""
    return ((path, weight) for path, weight in declared(weights) if HOOKS in path)


def _layers(weight: Weight) -> range:
    assert weight.layers is not None
    return weight.layers


def trained(section: Bottleneck, weights: Tree) -> set[str]:
    """Keys of the adapters' weights.

    Raises:
        ConfigError: leave_out names a layer that is not there, or all.
    """
    keys = {(layer, key) for _, weight in _own(weights) for layer, key in zip(_layers(weight), weight.keys)}
    layers, out = {layer for layer, _ in keys}, set(section.leave_out)
    if out - layers or out == layers:
        raise ConfigError(
            f"tune.leave_out {section.leave_out}: the model has the layers 0 to {max(layers)}, and one of them has to "
            "have an adapter"
        )
    return {key for layer, key in keys if layer not in out}


def wrap(section: Bottleneck, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None) -> Tree:
    """The parameters with the adapters as the library starts them; those of layers that are left out are zeros."""
    result, abstract = map_tree(lambda leaf: leaf, params), is_abstract(params)
    for path, weight in _own(weights):
        place = None if sharding_of is None else sharding_of(weight.full_shape, weight.full_axes)
        keys = jnp.stack([path_key(seed, key) for key in weight.keys])
        live = np.array([layer not in section.leave_out for layer in _layers(weight)], np.float32)
        kind = _kind(path[-1], section.init_weights)
        set_path(result, path, make(_initial, place, abstract, keys, live, shape=weight.shape, kind=kind))
    return result


def _kind(name: str, init: str) -> str:
    if name == "scaling":
        return "ones"
    if name.endswith("bias") or (init == "mam_adapter" and name == "up"):
        return "zeros"
    return {"bert": "normal", "mam_adapter": "uniform", "houlsby": "truncated"}[init]


def _initial(keys: jax.Array, live: jax.Array, *, shape: tuple[int, ...], kind: str) -> jax.Array:
    draw = {
        "zeros": lambda key: jnp.zeros(shape),
        "ones": lambda key: jnp.ones(shape),
        "normal": lambda key: 0.02 * jax.random.normal(key, shape),
        "uniform": lambda key: jax.random.uniform(key, shape, minval=-1, maxval=1) / math.sqrt(shape[-1]),
        "truncated": lambda key: 0.01 * jax.random.truncated_normal(key, -2, 2, shape),
    }[kind]
    return jax.vmap(draw)(keys) * live.reshape(-1, *[1] * len(shape))


def entries(section: Bottleneck, weights: Tree) -> list[Entry]:
    wanted = trained(section, weights)
    return [
        Entry(key, weight.shape, path, row, None)
        for path, weight in _own(weights)
        for row, key in enumerate(weight.keys)
        if key in wanted
    ]


# Source of the keys, their defaults and the files: adapters 1.3, `BnConfig` and what `save_adapter` writes.
OPTIONS = ("reduction_factor", "non_linearity", "scaling", "dropout", "init_weights", "leave_out")
DEFAULTS: dict[str, Any] = {"scaling": 1.0, "dropout": 0.0, "init_weights": "bert", "leave_out": []}
NEEDED = {
    "original_ln_after": True,
    "residual_before_ln": True,
    "stochastic_depth": 0.0,
}  # of the three arrangements that we have
OFF = ("ln_before", "ln_after", "adapter_residual_before_ln", "use_gating", "cross_adapter", "phm_layer")
HARMLESS = frozenset(
    {
        *("cross_adapter", "init_weights_seed", "inv_adapter_reduction_factor", *NEEDED),
        *("phm_dim", "phm_rank", "phm_bias", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity"),
        *("factorized_phm_W", "factorized_phm_rule", "shared_W_phm", "shared_phm_rule"),  # of phm_layer
    }
)
FORMAT = "adapters.1.3.0"


def read(tree: dict[str, Any], where: FilePath) -> dict[str, Any]:
    inner = tree["config"]
    for key, value in NEEDED.items():
        if inner.get(key, value) != value:
            raise AdapterError(f"{where}: {key} {inner[key]!r}; allowed is {value}")
    return {"name": tree.get("name", "default"), "non_linearity": str(inner.get("non_linearity")).lower()}


def write(section: Bottleneck, weights: Tree) -> dict[str, Any]:
    return {**NEEDED, **dict.fromkeys(OFF, False), "inv_adapter": None}


def around(settings: dict[str, Any], section: Bottleneck, weights: Tree, base_model_name: str | None) -> dict[str, Any]:
    hidden = get_path(weights, EMBEDDING).shape[1]
    named = {"model_name": base_model_name, "name": section.name, "version": FORMAT}
    return {"config": settings, "hidden_size": hidden, **named}


def _method(section: type[Bottleneck], mh_adapter: bool, original_ln_before: bool, is_parallel: bool) -> Method:
    files = Files(
        None,
        {option: option for option in OPTIONS},
        DEFAULTS,
        fixed={
            "mh_adapter": mh_adapter,
            "output_adapter": True,
            "original_ln_before": original_ln_before,
            "is_parallel": is_parallel,
        },
        harmless=HARMLESS,
        read=read,
        write=write,
        entries=entries,
        nested="config",
        around=around,
        tensors_name="adapter.safetensors",
    )
    return Method(section, trained=trained, wrap=wrap, files=files, hooks=hooks)


HOULSBY = _method(HoulsbySection, mh_adapter=True, original_ln_before=False, is_parallel=False)
PFEIFFER = _method(PfeifferSection, mh_adapter=False, original_ln_before=True, is_parallel=False)
PARALLEL = _method(ParallelSection, mh_adapter=False, original_ln_before=False, is_parallel=True)
