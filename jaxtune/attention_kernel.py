"""Which attention a run takes: chosen by platform, tried on a few packed rows, and said in a line.

The kernels are models/kernels.py's business, what is tried models/trial.py's.
"""

from typing import Any

from jax.sharding import Mesh

from jaxtune import processes
from jaxtune.config import Config
from jaxtune.console import say, warn
from jaxtune.errors import ConfigError
from jaxtune.models.config import ModelConfig
from jaxtune.models.kernels import NAMES, PLATFORMS, obstacle
from jaxtune.models.trial import trial
from jaxtune.number_types import compute_dtype


def settle(config: Config, model: ModelConfig, mesh: Mesh, one_document: bool = False) -> str:
    """What `memory.attention` comes to on these devices: xla, tiles, cudnn or splash, the same in every process.

    Tiles are not tried: they are XLA's own operations, which the tests compare. one_document: no row of the data has
    two.

    Raises:
        ConfigError: a kernel was asked for by name, and cannot be taken, or does not agree with plain XLA here.
    """
    asked, dtype, platform = config.memory.attention, compute_dtype(config.precision.compute), _platform(mesh)
    kernel, reason = choose(asked, model, dtype, platform, ring_of(config, mesh), config.data.share_prefix)
    if kernel == "xla":
        if platform != "cpu":
            say(f"Attention: plain XLA, because {reason or 'memory.attention asks for it'}")
        return kernel
    if kernel == "tiles":
        return kernel
    problem = _problem(kernel, model, dtype, config.data.share_prefix, one_document and not any(model.windows))
    if problem is None:
        say(f"Attention: {NAMES[kernel]}, which agrees with plain XLA on packed rows, forward and backward")
        return kernel
    text = f"{NAMES[kernel]} does not do on {mesh.devices.flat[0].device_kind}: {problem}"
    if asked != "auto":
        raise ConfigError(f"memory.attention: {asked}: {text}; set memory.attention to auto or xla")
    warn(f"{text}. Attention: plain XLA, which is slower and takes more memory")
    return "xla"


def ring_of(config: Config, mesh: Mesh) -> int:
    """How many devices a sequence goes round. With Ulysses each has whole ones."""
    return 1 if config.mesh.context_attention == "ulysses" else mesh.shape["context"]


def choose(
    asked: str, model: ModelConfig, dtype: Any, platform: str, ring: int, share_prefix: bool = False
) -> tuple[str, str | None]:
    """(kernel, why it is plain XLA although nobody asked for that). platform: jax's name; ring: what `ring_of` gives.

    Raises:
        ConfigError: what was asked for by name cannot be taken.
    """
    kernel = PLATFORMS.get(platform, "xla") if asked == "auto" else asked
    reason = obstacle(kernel, model, dtype, platform, ring, share_prefix)
    if reason is not None and asked != "auto":
        raise ConfigError(f"memory.attention: {asked}: {reason}; set memory.attention to auto or xla")
    return ("xla", reason) if reason else (kernel, None)


def _problem(kernel: str, model: ModelConfig, dtype: Any, share_prefix: bool, one_document: bool) -> str | None:
    """What is wrong with a kernel, in any of the processes: they have to run the same program."""
    found = None
    try:
        trial(kernel, model.num_heads, model.num_kv_heads, model.head_dim, dtype, share_prefix, one_document)
    except Exception as error:  # whatever a kernel, its compiler or its library raises
        found = processes.first_line(str(error)) or type(error).__name__
    return next((text for text in processes.gathered("attention", found) if text), None)


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform
