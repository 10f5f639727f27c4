"""P-tuning: the virtual tokens' embeddings are what a small encoder gives, and the encoder trains.

Legend: V virtual tokens, E the model's hidden size, H the encoder's.
"""

import math
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import model_validator

from jaxtune import ops
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import HOOKS, Tree
from jaxtune.ops import Noise
from jaxtune.section import Fraction, Positive
from jaxtune.tune.method import Method, ShardingOf, get_path
from jaxtune.tune.peft_files import Derived, Files
from jaxtune.tune.virtual import (
    EMBEDDINGS,
    ENCODER_FILE,
    HARMLESS,
    SETTINGS,
    Virtual,
    VirtualHooks,
    linear,
    linear_bounds,
    linear_weights,
    matrix,
    number_of_layers,
    own_entries,
    own_keys,
    precise,
    put,
    read_virtual,
    write_virtual,
)

DIRECTIONS = {"": False, "_reverse": True}  # torch's names of an LSTM's, and whether it runs backwards


class PTuningSection(Virtual):
    """Embeddings before every conversation that an encoder gives (Liu et al. 2021, arXiv 2103.10385).

    The adapter holds what PEFT's holds, and the encoder in prompt_encoder.safetensors beside it, without which
    training could not go on: a P-tuning adapter that has none loads as the method prompt.
    """

    method: Literal["p_tuning"] = "p_tuning"
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"  # LSTM: both ways, then two layers
    encoder_hidden_size: Positive | None = None  # null: the model's
    encoder_num_layers: Positive = 2  # of the LSTM
    encoder_dropout: Fraction = 0.0  # between the layers of the LSTM

    @model_validator(mode="after")
    def _nothing_unused(self):
        if self.encoder_reparameterization_type == "MLP":
            for name in ("encoder_num_layers", "encoder_dropout"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to encoder_reparameterization_type LSTM and would do nothing")
        if self.encoder_dropout and self.encoder_num_layers == 1:
            raise ValueError("encoder_dropout is between the layers of the LSTM, which has one: it would do nothing")
        return self


@dataclass(frozen=True)
class Encoder(VirtualHooks):
    """PEFT's PromptEncoder: an embedding [V, E], then three linear layers, or an LSTM and two."""

    kind: str
    size: int  # H
    layers: int = 2  # of the LSTM
    dropout: float = 0.0

    def shared(self, config: ModelConfig) -> Tree:
        hidden, size = config.hidden_size, self.size
        weights: Tree = {"embedding_weight": matrix("embedding.weight", (self.count, hidden), hidden)}
        if self.kind == "LSTM":
            for label, in_size in self._lstm_labels(hidden):
                for name, shape in lstm_shapes(label, in_size, size).items():
                    weights[name] = matrix(f"lstm_head.{name}", shape, hidden)
        for place, in_size, out_size in self._linears(hidden):
            weights |= linear_weights(f"mlp_head.{place}", in_size, out_size, hidden)
        return weights

    def embedded(self, shared: Tree, slots_BT: jax.Array, dtype: Any, noise: Noise | None) -> jax.Array:
        return ops.embed(slots_BT, self.encode(shared, noise), dtype)

    def encode(self, own: Tree, noise: Noise | None = None) -> jax.Array:
        """The embeddings [V, E]. What dropout drops is the same wherever they stand in a batch."""
        x = own["embedding_weight"]
        if self.kind == "LSTM":
            for label, _ in self._lstm_labels(0)[::2]:
                if label != "l0" and noise is not None:
                    own_noise = Noise(noise.fold_in(int(label[1:])).key, jnp.arange(self.count))
                    x = ops.dropout(x, self.dropout, own_noise)
                ways = [lstm(x, own, label + name, backwards) for name, backwards in DIRECTIONS.items()]
                x = jnp.concatenate(ways, axis=-1)
        for place, (name, _, _) in enumerate(self._linears(0)):
            x = linear(jax.nn.relu(x) if place else x, own, f"mlp_head_{name}")
        return x

    def bounds(self, hidden: int) -> dict[str, float | None]:
        """torch's first values."""
        result: dict[str, float | None] = {"embedding_weight": None}
        for name, in_size, _ in self._linears(hidden):
            result |= linear_bounds(f"mlp_head_{name}", in_size)
        for label, in_size in self._lstm_labels(hidden) if self.kind == "LSTM" else ():
            result |= dict.fromkeys(lstm_shapes(label, in_size, self.size), 1 / math.sqrt(self.size))
        return result

    def _linears(self, hidden: int) -> list[tuple[int, int, int]]:
        """(place in PEFT's mlp_head, sizes of what goes in and what comes out); an activation is between them."""
        if self.kind == "LSTM":
            return [(0, 2 * self.size, 2 * self.size), (2, 2 * self.size, hidden)]
        return [(0, hidden, self.size), (2, self.size, self.size), (4, self.size, hidden)]

    def _lstm_labels(self, hidden: int) -> list[tuple[str, int]]:
        """(end of torch's names, size of what goes in) of each layer, forwards and backwards."""
        sizes = [hidden if layer == 0 else 2 * self.size for layer in range(self.layers)]
        return [(f"l{layer}{way}", size) for layer, size in enumerate(sizes) for way in DIRECTIONS]


def lstm_shapes(label: str, in_size: int, size: int) -> dict[str, tuple[int, ...]]:
    """torch's weights of one direction of one layer: the gates input, forget, cell and output under one another."""
    return {
        f"weight_ih_{label}": (4 * size, in_size),
        f"weight_hh_{label}": (4 * size, size),
        f"bias_ih_{label}": (4 * size,),
        f"bias_hh_{label}": (4 * size,),
    }


def lstm(x_VI: jax.Array, own: Tree, label: str, backwards: bool) -> jax.Array:
    """One direction of one layer, [V, in] -> [V, H] (Hochreiter and Schmidhuber 1997, as torch.nn.LSTM has it)."""
    weight = own[f"weight_hh_{label}"]
    given = x_VI @ own[f"weight_ih_{label}"].T + own[f"bias_ih_{label}"] + own[f"bias_hh_{label}"]

    def step(carry, given):
        hidden, cell = carry
        come, keep, new, out = jnp.split(given + weight @ hidden, 4)
        cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(come) * jnp.tanh(new)
        hidden = jax.nn.sigmoid(out) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zeros = jnp.zeros(weight.shape[1], given.dtype)
    return jax.lax.scan(step, (zeros, zeros), given, reverse=backwards)[1]


def hooks(section: PTuningSection, config: ModelConfig) -> Encoder:
    return _encoder(section, config.hidden_size)


def _encoder(section: PTuningSection, hidden: int) -> Encoder:
    size = section.encoder_hidden_size or hidden
    kind = section.encoder_reparameterization_type
    return Encoder(section.num_virtual_tokens, kind, size, section.encoder_num_layers, section.encoder_dropout)


def wrap(section: PTuningSection, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None) -> Tree:
    hidden = _hidden_size(weights)
    return put(params, weights, _encoder(section, hidden).bounds(hidden), seed, sharding_of)


def _hidden_size(tree: Tree) -> int:
    """Of the declarations, or of the parameters."""
    return get_path(tree, (HOOKS, "embedding_weight")).shape[1]


def derived(section: PTuningSection) -> Derived:
    return Derived(ENCODER_FILE, _outputs)


def _outputs(section: PTuningSection, params: Tree) -> dict[str, jax.Array]:
    return {EMBEDDINGS: precise(_encoder(section, _hidden_size(params)).encode)(params[HOOKS])}


def read(tree: dict[str, Any], where: FilePath) -> dict[str, Any]:
    """Of an MLP, PEFT has the LSTM's options too, and ignores them."""
    is_mlp = tree.get("encoder_reparameterization_type", "MLP") == "MLP"
    unused = {"encoder_num_layers": 2, "encoder_dropout": 0.0}
    return {**read_virtual(tree, where), **(unused if is_mlp else {})}


def write(section: PTuningSection, weights: Tree) -> dict[str, Any]:
    hidden = _hidden_size(weights)
    size = section.encoder_hidden_size or hidden
    return {**write_virtual(hidden, number_of_layers(weights)), "encoder_hidden_size": size}


OPTIONS = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
P_TUNING_FILES = Files(
    "P_TUNING",
    {**SETTINGS, **{name: name for name in OPTIONS}},
    {},
    harmless=HARMLESS,
    read=read,
    write=write,
    entries=own_entries,
    derived=derived,
    claims_file=ENCODER_FILE,
)
P_TUNING = Method(PTuningSection, trained=own_keys, wrap=wrap, files=P_TUNING_FILES, hooks=hooks)
