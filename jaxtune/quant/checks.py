"""Whether a run can train over a quantised model: asked before a weight is read."""

from functools import lru_cache

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import tune
from jaxtune.config import Config
from jaxtune.errors import ConfigError, listing
from jaxtune.leaves import Axes
from jaxtune.mesh import rules_of, spec
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import Model
from jaxtune.models.weights import Tree, leaves_with_path
from jaxtune.quant.leaf import Quantized, check_split, parts_of
from jaxtune.quant.scheme import Scheme, scheme_of, shapes_of


def check_quantized(config: Config, mesh: Mesh, model: ModelConfig) -> None:
    """Refuse what needs the quantised weights' own numbers, to train them or to round them once more, and a mesh that
    cannot share them out.

    Raises:
        ConfigError: the configuration asks for it.
        MeshError: the message has the numbers.
    """
    scheme = scheme_of(config.model, model, config.model.path)
    if scheme is None:
        return
    if config.precision.matmul == "float8":
        raise ConfigError(
            f"precision.matmul float8 over {scheme.name}: the weights have fewer bits than float8 already; set "
            "precision.matmul: default, or load the model unquantised"
        )
    rules = rules_of(mesh, model, config.mesh.zero)
    for key, name, shape, axes in _parts(scheme, model):
        check_split(key, name, shape[1:], spec(axes[1:], rules), mesh.shape)
    section = tune.resolve(config.tune)
    linear = {key for _, weight in leaves_with_path(_declared(model)) if weight.is_linear for key in weight.keys}
    weights = Model.create(model, hooks=tune.hooks(section, model)).weights  # with the method's own, never quantised
    trained = sorted(linear & tune.METHODS[section.method].trained(section, weights))
    if trained:
        raise ConfigError(
            f"tune.method {section.method} over {scheme.name} would train {listing(trained, 3)}, and a quantised "
            "weight cannot train; take a method that leaves it frozen, such as lora, or load the model unquantised"
        )


@lru_cache
def _declared(model: ModelConfig) -> Tree:
    return Model.create(model).weights


@lru_cache
def _parts(scheme: Scheme, model: ModelConfig) -> list[tuple[str, str, tuple[int, ...], Axes]]:
    """(key, part, shape, logical axes) of everything quantised, its layers along axis 0."""
    found = []
    for _, weight in leaves_with_path(_declared(model)):
        leaf = shapes_of(scheme, weight, jnp.float32)
        if isinstance(leaf, Quantized):
            axes = leaf.axes(weight.full_axes, weight.is_table)
            found += [(weight.key, name, part.shape, axes[name]) for name, part in parts_of(leaf).items()]
    return found
