"""What a compiled step computes and sends, for tools/scaling.py: read off a program for devices that are not there."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MACHINE = 8  # devices in one
# The pass of XLA for CPUs in front of which collectives still have the program's own types: from there on it makes
# float32 of bfloat16, which no accelerator does.
STAGE = "all-reduce-promotion"


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over one set of axes. sent: bytes of one device in a step. members: of a group that lie
    in one machine; devices: of a group."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    times: int
    sent: int
    devices: int
    members: int

    @property
    def crosses(self) -> bool:
        """Between machines."""
        return self.members < self.devices


@dataclass(frozen=True)
class Count:
    """What was read off one compiled step; flops and bytes of one device."""

    way: str
    devices: int
    mesh: dict[str, int]
    flops: float
    alone: float  # operations of one device that has all of the model, for as many tokens
    state: int  # bytes of weights, moments and gradients
    bubble: float
    traffic: tuple[Traffic, ...]

    @classmethod
    def of(cls, tree: dict) -> "Count":
        """From JSON."""
        traffic = tuple(Traffic(**{**one, "axes": tuple(one["axes"])}) for one in tree["traffic"])
        return cls(**{**tree, "traffic": traffic})


def count_step(way: str, config, model, here: list) -> Count:
    """Of a configuration on these devices."""
    from jaxtune.mesh import make_mesh
    from jaxtune.plan.hlo import collectives
    from jaxtune.plan.memory import tree_bytes
    from jaxtune.plan.program import make_step

    step = make_step(config, model, make_mesh(config.mesh, here))
    sizes, traced = dict(step.mesh.shape), step.trace()
    found = collectives(compiled_text(traced), sizes, step.loop_trips, step.shares)
    return Count(
        way,
        step.mesh.size,
        {axis: size for axis, size in sizes.items() if size > 1},
        operations(step, traced),
        alone(config, model, here) * step.tokens / step.mesh.size,
        tree_bytes(step.program.state).total() + step.gradients.total(),
        step.bubble,
        together(found, sizes),
    )


def operations(step, traced) -> float:
    from jaxtune.plan.flops import Place, matmul_flops

    return matmul_flops(traced.jaxpr, step.loop_trips, Place(step.shares)).on_each(step.mesh.size)


def alone(config, model, here: list) -> float:
    """Operations for a token on one device without a mesh."""
    from jaxtune.config import MeshSection
    from jaxtune.mesh import make_mesh
    from jaxtune.plan.program import make_step

    train = config.train.model_copy(update={"batch_size": 1, "micro_batches": 1})
    memory = config.memory.model_copy(update={"remat": "block"})
    config = config.model_copy(update={"mesh": MeshSection(fsdp=1), "train": train, "memory": memory})
    step = make_step(config, model, make_mesh(config.mesh, here[:1]))
    return operations(step, step.trace()) / step.tokens


def compiled_text(traced) -> str:
    """The HLO of the program as it is split over the devices, in front of STAGE."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    used = jax.config.jax_enable_compilation_cache
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": STAGE}
        try:  # a program from the cache leaves no text
            jax.config.update("jax_enable_compilation_cache", False)
            compilation_cache.reset_cache()
            # What comes after is not read, and machine code that is not optimised is there sooner.
            traced.lower().compile(compiler_options={**options, "xla_backend_optimization_level": 0})
        finally:
            jax.config.update("jax_enable_compilation_cache", used)
            compilation_cache.reset_cache()
        texts = [path.read_text(encoding="utf-8") for path in Path(dump).glob(f"*before_{STAGE}*.txt")]
    return max(texts, key=len)


def together(found: list, sizes: dict[str, int]) -> tuple[Traffic, ...]:
    """Collectives of one kind, over the same axes, of one type, are one; most bytes first."""
    groups: dict[tuple, list] = {}
    for one in found:
        groups.setdefault((one.kind, one.axes, one.dtype), []).append(one)
    rows = []
    for (kind, axes, dtype), ones in groups.items():
        times, sent = sum(one.times for one in ones), sum(one.sent for one in ones)
        # Groups that no set of axes gives may lie anywhere: they are taken to be the slowest.
        inside = members(sizes, axes) if axes else 1
        rows.append(Traffic(kind, axes, dtype, times, sent, ones[0].devices, inside))
    return tuple(sorted(rows, key=lambda row: -row.sent))


def members(mesh: dict[str, int], axes: tuple[str, ...], machine: int = MACHINE) -> int:
    """How many of a group along these axes lie in one machine; a mesh's last axis has the nearest neighbours."""
    ids = np.arange(np.prod(list(mesh.values()))).reshape(list(mesh.values()))
    group = ids[tuple(slice(None) if axis in axes else 0 for axis in mesh)].reshape(-1)
    return int((group < machine).sum())
