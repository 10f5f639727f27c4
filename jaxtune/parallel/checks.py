"""Whether a configuration fits its mesh and its model: asked before a weight or a row of data is read."""

from jax.sharding import Mesh

from jaxtune.config import Config
from jaxtune.errors import ConfigError
from jaxtune.mesh import check_batch, check_model
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.schedule import check_numbers
from jaxtune.parallel.stages import Stages
from jaxtune.parallel.ulysses import check_heads
from jaxtune.quant.checks import check_quantized


def check_fit(config: Config, mesh: Mesh, model: ModelConfig) -> None:
    """Refuse what the mesh cannot share out: heads, sizes, layers, rows; and a quantised model under a tuning method
    that would train it. Lengths are mesh.check_time's.

    Raises:
        MeshError: the message has the numbers that would do.
        ConfigError: of quant/checks.py; or data.share_prefix under a window.
    """
    section, train, sizes = config.mesh, config.train, mesh.shape
    check_batch(mesh, train.batch_size, train.micro_batches)
    check_model(mesh, model)
    check_quantized(config, mesh, model)
    check_windows(config, model)
    if sizes["context"] > 1 and section.context_attention == "ulysses":
        check_heads(model.num_heads // sizes["tensor"], sizes["context"])
    if sizes["pipe"] > 1:
        check_numbers(section.schedule, sizes["pipe"], train.micro_batches, section.virtual_stages)
        Stages.of(model.num_layers, sizes["pipe"], section.virtual_stages)


def check_windows(config: Config, model: ModelConfig) -> None:
    """A window counts places of a row, and a shared start is further away from most conversations than its positions.

    Raises:
        ConfigError: the two do not go together.
    """
    window = min((width for width in model.windows if width is not None), default=None)
    if config.data.share_prefix and window is not None and window < config.data.max_length:
        raise ConfigError(
            f"data.share_prefix: the model's attention sees {window} places back, and the start that conversations "
            f"share may lie {config.data.max_length} (data.max_length) away; set it to false"
        )
