"""How a forward pass is carried out: settings that change where and when things are computed, never what."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune import cpu_bfloat16
from jaxtune.config import Config, MemorySection
from jaxtune.float8 import E4M3
from jaxtune.models import kernels
from jaxtune.models.config import ModelConfig
from jaxtune.models.tiled import SAVED

HOST = "pinned_host"  # jax's name for the host's memory that a device reads from
LONG = 1e17  # operations of a run, of which compiling without a loop wins back on an H100 what it takes longer
WEIGHT = "weight"  # checkpoint name of a weight as a layer uses it: gathered, fetched or cast, and never kept


@dataclass(frozen=True)
class Execution:
    """Settings of a forward pass and its backward pass.

    weights_split: weights lie in parts along fsdp, and are gathered layer by layer. sequence_parallel: between
    attention and MLP the sequence is split over the tensor axis (Korthikanti et al. 2022, arXiv 2205.05198).
    remat: none | dots | block | full, or the names that a layer keeps. sum_dtype: that gradients are summed up in;
    None: the weights' own. float8: the layers' linear maps multiply in it. attention: of whole sequences, a name
    in kernels.NAMES. unroll: no loop over the layers. one_document: no row of a batch has two, and
    attention may go by order alone.
    """

    weights_split: bool = True
    sequence_parallel: bool = False
    context_attention: str = "ring"
    remat: str | tuple[str, ...] = tuple(MemorySection().remat)
    offload_activations: bool = False
    offload_params: bool = False
    sum_dtype: Any = None
    float8: bool = False
    attention: str = "xla"
    unroll: bool = False
    one_document: bool = False

    @classmethod
    def of(
        cls,
        config: Config,
        compute_dtype: Any,
        attention: str = "xla",
        *,
        one_document: bool = False,
        unroll: bool = False,
    ) -> "Execution":
        """As a configuration asks for it. attention, unroll: what its `memory.attention` and `memory.unroll: auto` come
        to on the devices."""
        mesh, memory = config.mesh, config.memory
        remat = memory.remat if isinstance(memory.remat, str) else tuple(memory.remat)
        if isinstance(remat, tuple) and mesh.context != 1:
            remat = tuple(dict.fromkeys((*remat, SAVED)))  # else the backward pass would go round the ring again
        if isinstance(remat, tuple) and "activations" not in memory.offload:
            remat = kernels.keeps(attention, remat)
        return cls(
            weights_split=mesh.zero == 3,
            sequence_parallel=mesh.sequence_parallel,
            context_attention=mesh.context_attention,
            remat=remat,
            offload_activations="activations" in memory.offload,
            offload_params="params" in memory.offload,
            sum_dtype=compute_dtype if memory.gradients == "compute" else None,
            float8=config.precision.matmul == "float8",
            attention=attention,
            unroll=unroll if memory.unroll == "auto" else memory.unroll,
            one_document=one_document,
        )

    @property
    def places(self) -> tuple[int, str | None]:
        """Where the weights lie: the level of ZeRO that splits them or not, and the kind of memory."""
        return 3 if self.weights_split else 0, HOST if self.offload_params else None

    def policy(self) -> Any:
        """What a layer keeps for its backward pass; the rest is computed again."""
        policies = jax.checkpoint_policies
        if self.remat == "none":
            return _keeps_all
        if self.remat == "dots":
            return cpu_bfloat16.dots
        if isinstance(self.remat, str):
            return policies.nothing_saveable
        if self.offload_activations:
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=list(self.remat),
                offload_src="device",
                offload_dst=HOST,
            )
        return kernels.policy(self.attention, self.remat)

    def groups(self, layers: int) -> int:
        """In how many groups the layers are taken, of which only the inputs are kept; as many as layers: in none.

        remat full: the divisor nearest to the square root, where groups and layers of a group together are fewest.
        """
        if self.remat != "full":
            return layers
        divisors = [n for n in range(1, layers + 1) if layers % n == 0]
        return min(divisors, key=lambda n: n + layers // n)


def _keeps_all(primitive: Any, *avals: Any, **params: Any) -> bool:
    """A policy: all but weights and numbers in e4m3.

    JAX rounds what a policy keeps to its own type again, and e4m3fn as if its largest number were 240, that of IEEE
    754's e4m3, and not 448: what lies between would come back as NaN.
    """
    if primitive.name == "convert_element_type" and params["new_dtype"] == E4M3:
        return False
    return jax.checkpoint_policies.save_anything_except_these_names(WEIGHT)(primitive, *avals, **params)


USUAL = Execution()


def worth_unrolling(config: Config, mesh: Mesh, model: ModelConfig, tokens: int) -> bool:
    """What `memory.unroll: auto` comes to. tokens: of a whole run.

    Not where memory is short: without a loop, the compiler makes some of what remat block and full leave to the
    backward pass earlier than it is needed.
    """
    platform, memory = mesh.devices.flat[0].platform, config.memory
    is_roomy = memory.remat not in ("block", "full") and not memory.offload
    return mesh.size == 1 and platform == "gpu" and is_roomy and 4 * model.matmul_weights * tokens >= LONG
