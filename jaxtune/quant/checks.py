"""Whether a run can train over a quantised model: asked before a weight is read."""

from functools import lru_cache

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import tune
from jaxtune.config import Config
from jaxtune.errors import ConfigError, listing
from jaxtune.mesh import rules_of, spec
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import Model
from jaxtune.models.weights import Weight, leaves_with_path
from jaxtune.quant.checkpoints import Tensors
from jaxtune.quant.leaf import Quantized, check_split, parts_of
from jaxtune.quant.scheme import Scheme, scheme_of, shapes_of

Leaves = list[tuple[Weight, Quantized]]  # as shapes, the layers along axis 0


def check_quantized(config: Config, mesh: Mesh, model: ModelConfig, files: Tensors | None = None) -> None:
    """Refuse what needs the quantised weights' own numbers, to train them or to round them once more, and a mesh that
    cannot share them out.

    files: of a model that is quantised on disk: which weights are is their word. None: the settings' alone.

    Raises:
        ConfigError: the configuration asks for it.
        MeshError: the message has the numbers.
        ModelError: the files are not what the settings say.
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
    leaves = _by_settings(scheme, model) if files is None else _leaves(scheme, model, files)
    for weight, leaf in leaves:
        axes = leaf.axes(weight.full_axes, weight.is_table)
        for name, part in parts_of(leaf).items():
            check_split(weight.key, name, part.shape[1:], spec(axes[name][1:], rules), mesh.shape)
    section = tune.resolve(config.tune)
    weights = Model.create(model, hooks=tune.hooks(section, model)).weights
    quantized = {key for weight, _ in leaves for key in weight.keys}
    trained = sorted(quantized & tune.METHODS[section.method].trained(section, weights))
    if trained:
        setting, way = f"method {section.method}", "take a method that leaves it frozen, such as lora"
        if tune.has_adapter(section):
            setting, way = "modules_to_save", "leave it out there"
        raise ConfigError(
            f"tune.{setting} over {scheme.name} would train {listing(trained, 3)}, and a quantised weight cannot "
            f"train; {way}, or load the model unquantised"
        )


@lru_cache
def _by_settings(scheme: Scheme, model: ModelConfig) -> Leaves:
    return _leaves(scheme, model, None)


def _leaves(scheme: Scheme, model: ModelConfig, files: Tensors | None) -> Leaves:
    """Of every weight that is quantised; what a method adds never is."""
    weights = [weight for _, weight in leaves_with_path(Model.create(model).weights)]
    shapes = [(weight, shapes_of(scheme, weight, jnp.float32, tensors=files)) for weight in weights]
    return [(weight, leaf) for weight, leaf in shapes if isinstance(leaf, Quantized)]
