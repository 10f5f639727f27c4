"""From a model section and a tuning section to a model with its parameters: what training, generation,
export and the Python calls all start from.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import tune
from jaxtune.config import ModelSection
from jaxtune.console import warn
from jaxtune.errors import MeshError
from jaxtune.hf_io import WeightSource, load_params, open_source, resolve_model
from jaxtune.hub import holds_adapter
from jaxtune.mesh import axes_sharding, check_model, shardings
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import Model
from jaxtune.models.execution import USUAL, Execution
from jaxtune.models.families import read_config
from jaxtune.models.weights import Tree, init_params, map_tree
from jaxtune.quant.scheme import AtLoad, Quantizer, Scheme, scheme_of
from jaxtune.section import TuneSection, adapter_of
from jaxtune.tokenizer import (
    check_tokenizer,
    load_tokenizer,
    shares_ids,
    special_ids,
    stop_ids,
    tokenizer_of,
    vocabulary_size,
)
from jaxtune.tune.full import FullSection

FULL = FullSection()


@dataclass(frozen=True)
class Source:
    """A model as it lies on disk, before any weight is read."""

    path: Path  # a directory or a .gguf file
    config: ModelConfig
    tokenizer: Any  # with the tokens that the tuning method adds
    scheme: Scheme | None = None  # how its linear maps are quantised
    tuning: TuneSection = FULL  # resolved, with what it needs of the tokenizer
    adds_words: bool = False  # whether the method adds any tokens
    own_ids: bool = True  # whether the token ids in the model's files are this tokenizer's

    @classmethod
    def open(
        cls,
        section: ModelSection,
        template: str | None = None,
        tuning: TuneSection = FULL,
        weights: bool = True,
        noted: str | None = None,
    ) -> "Source":
        """Find the model, read its settings and its tokenizer, and check that the two fit under a tuning method.

        weights: whether those of a model on the hub are wanted too. noted: as load_tokenizer has it.
        """
        weights = weights and section.init == "pretrained"
        path = resolve_model(section.path, section.revision, weights=weights)
        if weights and holds_adapter(path) and adapter_of(tuning) is None:
            warn(
                f"{section.path}: holds an adapter too, which transformers would put on the model; jaxtune leaves it "
                "off: give the directory as adapter as well, or move adapter_config.json away"
            )
        config = read_config(path, section.overrides)
        words = path if section.tokenizer is None else resolve_model(section.tokenizer, weights=False)
        tokenizer = load_tokenizer(words, template, noted)
        own_ids = section.tokenizer is None or shares_ids(tokenizer, tokenizer_of(path))
        if not own_ids:
            config = replace(config, hf={**config.hf, **special_ids(tokenizer)})
        before = vocabulary_size(tokenizer)
        tokenizer, tuning = tune.words(tuning, tokenizer)
        check_tokenizer(tokenizer, tune.vocab_size(tuning, config))
        scheme = scheme_of(section, config, str(path))
        return cls(path, config, tokenizer, scheme, tuning, vocabulary_size(tokenizer) > before, own_ids)

    @property
    def quantized(self) -> WeightSource | None:
        """The tensors of a model that is quantised on disk; of another one, None. Only headers are read."""
        is_stored = self.scheme is not None and not isinstance(self.scheme, AtLoad)
        return open_source(self.path, self.config.tied) if is_stored else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a reply."""
        return stop_ids(self.tokenizer, self.path if self.own_ids else None)


@dataclass(frozen=True)
class Assembled:
    """A model, its parameters with a tuning method's leaves in place, and what of them trains."""

    model: Model
    params: Tree
    mask: Tree
    mesh: Mesh
    source: Source

    @property
    def source_weights(self) -> Tree:
        """The declarations of the model as it lies on disk, in the same stacks."""
        return Model.create(self.source.config, self.model.stacks).weights


def assemble(
    source: Source,
    section: TuneSection,
    mesh: Mesh,
    *,
    init: str = "pretrained",
    dtype: str = "float32",
    quantized_from: str | None = None,
    seed: int = 0,
    execution: Execution = USUAL,
    layers_apart: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Assembled:
    """Declare, load (or initialise) and wrap: every array is made in its own shards.

    quantized_from: the type of the weights that are quantised as they are loaded, before they are; None: dtype. A run's
    has to be the one that it trained with, or its weights get other codes.
    init: pretrained, random, or shapes: then the parameters are jax.ShapeDtypeStructs and nothing is read or made.
    execution: also says where the arrays lie. layers_apart: every layer has arrays of its own, and stands in programs
    by itself. progress: called with (what, bytes done, bytes in all) while weights are read.

    Raises:
        MeshError, ModelError, AdapterError: what does not fit, by name, before any weight is read.
    """
    check_model(mesh, source.config)
    config, stacks = tune.layout(section, source.config, one_stack=mesh.shape["pipe"] > 1)
    if layers_apart:
        stacks = tuple(range(layer, layer + 1) for layer in range(config.num_layers))
    _check_grown(mesh, source.config, config)
    model = Model.create(config, stacks, execution, tune.hooks(section, config))
    stored = Model.create(source.config, stacks).weights
    places = execution.places
    homes = shardings(mesh, config, stored, *places)
    sharding_of = axes_sharding(mesh, config, *places)
    quantizer = Quantizer(source.scheme, sharding_of, tune.quantized(section, model.weights), quantized_from)
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    files = open_source(source.path, source.config.tied) if init == "pretrained" else None
    make = lambda weight, home: quantizer.shape(weight, shape(weight.full_shape, sharding=home), files)  # noqa: E731
    wrap = lambda params: tune.apply(section, params, model.weights, seed, sharding_of, source.tokenizer)  # noqa: E731
    params: Tree = map_tree(make, stored, homes)
    if init != "shapes":
        wrap(params)  # what does not fit is said before any weight is read
    if init == "random":
        params = init_params(
            stored, homes, seed, config.init_std, jnp.dtype(dtype), quantizer.loaded, quantizer.type_of
        )
    elif files is not None:
        params = load_params(files, stored, homes, jnp.dtype(dtype), progress, quantizer)
    params, mask = wrap(params)
    return Assembled(model, params, mask, mesh, source)


def _check_grown(mesh: Mesh, before: ModelConfig, now: ModelConfig) -> None:
    """New tokens may make tables that the tensor axis does not divide."""
    rest = now.vocab_size % mesh.shape["tensor"]
    if rest:
        raise MeshError(
            f"mesh.tensor = {mesh.shape['tensor']} divides the model's vocabulary of {before.vocab_size}, but not the "
            f"{now.vocab_size} that it has with tune.new_tokens; name {mesh.shape['tensor'] - rest} more, spare ones"
        )


def adapted(base: Assembled, section: TuneSection) -> Assembled:
    """A loaded model with an adapter on it. The two share every array that the adapter leaves as it is; tokens that
    come with the adapter are in its tokenizer and its tables alone.

    base: assembled without an adapter. section: that of an adapter (peft_config.read_config).

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    tokenizer, section = tune.words(section, base.source.tokenizer)
    config, _ = tune.layout(section, base.source.config, one_stack=True)
    check_tokenizer(tokenizer, config.vocab_size)
    _check_grown(base.mesh, base.source.config, config)
    model = Model.create(config, base.model.stacks, base.model.execution, tune.hooks(section, base.source.config))
    where = axes_sharding(base.mesh, config, *base.model.execution.places)
    params, mask = tune.apply(section, base.params, model.weights, 0, where, tokenizer)
    return replace(base, model=model, params=params, mask=mask, source=replace(base.source, tokenizer=tokenizer))
