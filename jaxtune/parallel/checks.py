"""Whether a configuration fits its mesh and its model: asked before a weight or a row of data is read."""

import jaxlib
from jax.sharding import Mesh
from packaging.version import Version

from jaxtune.config import Config
from jaxtune.errors import ConfigError
from jaxtune.mesh import check_batch, check_model
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.schedule import check_numbers
from jaxtune.parallel.stages import Stages
from jaxtune.parallel.ulysses import check_heads
from jaxtune.quant.checkpoints import Tensors
from jaxtune.quant.checks import check_quantized


def check_fit(config: Config, mesh: Mesh, model: ModelConfig, files: Tensors | None = None) -> None:
    """Refuse what the mesh cannot share out: heads, sizes, layers, rows; and a quantised model under a tuning method
    that would train it. Lengths are mesh.check_time's.

    files: as check_quantized has them.

    Raises:
        MeshError: the message has the numbers that would do.
        ConfigError: of quant/checks.py; or data.share_prefix under a window.
    """
    section, train, sizes = config.mesh, config.train, mesh.shape
    check_batch(mesh, train.batch_size, train.micro_batches)
    check_model(mesh, model)
    check_quantized(config, mesh, model, files)
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


def check_offload(config: Config, mesh: Mesh, version: str = jaxlib.__version__) -> None:
    """XLA for GPUs may read a loop's arrays in the host's memory forwards where the backward pass goes backwards, which
    gives wrong gradients (xla pull request 46231; seen with 0.11.0, and 0.10.2 has the same pass).

    Raises:
        ConfigError: it would be so with this version of jaxlib.
    """
    read_back = [name for name in config.memory.offload if name in ("activations", "params")]
    if read_back and mesh.devices.flat[0].platform == "gpu" and Version(version) < Version("0.11.1"):
        raise ConfigError(
            f"memory.offload: {', '.join(read_back)}: on GPUs, jaxlib {version} may read them in the wrong order, and "
            "gradients are wrong then; take jax 0.11.1 or later, which needs Python 3.12, or leave them out"
        )
