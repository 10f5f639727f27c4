"""One step, compiled ahead of time for a target, and what it says of itself."""

import re
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxtune.errors import UserError
from jaxtune.files import temporary_directory
from jaxtune.plan.flops import Place, matmul_flops
from jaxtune.plan.hlo import Collective, collectives
from jaxtune.plan.memory import DEVICE, HOST, Compiled, tree_bytes
from jaxtune.plan.program import Step
from jaxtune.plan.target import Target, quiet

# libtpu's words where a step does not fit: a program that is too large, or temporaries that are so by themselves.
REFUSED = re.compile("HbmOom|Ran out of memory (on|in memory space) hbm", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """What a step needs on each device: bytes by kind of memory, and matmul operations."""

    step: Step
    memory: Compiled
    parameters: Counter[str]
    gradients: Counter[str]
    optimizer: Counter[str]
    flops: float  # that are computed
    model_flops: float  # that the model asks for
    transfers: list[Collective] = field(repr=False)
    seconds: float = 0.0  # that compiling took
    refused: bool = False  # by the compiler itself, for want of memory

    @property
    def temporaries(self) -> int:
        """Activations and whatever else lives within a step, but for the gradients."""
        return max(self.memory.temporaries - self.gradients[DEVICE], 0)

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a step."""
        return sum(one.sent for one in self.transfers)

    def fits(self, budget: int | None) -> bool:
        return not self.refused and (budget is None or self.memory.peak <= budget)


def compile_step(step: Step, target: Target) -> Plan:
    """Compile for the target's devices; no array is made."""
    started = time.monotonic()
    traced = step.trace()
    with temporary_directory() if target.is_tpu else nullcontext() as dump:
        memory, text, refused = _compile(step, traced, None if dump is None else Path(dump))
    state, devices = step.program.state, step.mesh.size
    return Plan(
        step,
        memory,
        parameters=tree_bytes(state["trainable"]) + tree_bytes(step.program.frozen),
        gradients=step.gradients,
        optimizer=tree_bytes(state["optimizer"]),
        flops=matmul_flops(traced.jaxpr, step.loop_trips, Place(step.shares)).on_each(devices),
        model_flops=step.model_flops / devices,
        transfers=collectives(text, dict(step.mesh.shape), step.loop_trips, step.shares),
        seconds=time.monotonic() - started,
        refused=refused,
    )


def _compile(step: Step, traced: Any, dump: Path | None) -> tuple[Compiled, str, bool]:
    """(memory, HLO text, whether the compiler refused).

    dump: a directory for libtpu's own text, which is there after a refusal too. JAX's as_text() would read libtpu's
    program with the HLO library of jaxlib, which may be of another version, and then fails.
    """
    host = tree_bytes(step.arguments)[HOST]
    lowered = traced.lower()
    if dump is None:
        compiled = lowered.compile()
        return Compiled.of(compiled, host), compiled.as_text(), False
    refused = False
    try:
        with quiet():
            compiled = lowered.compile(compiler_options={"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True})
        memory = Compiled.of(compiled, host)
    except jax.errors.JaxRuntimeError as problem:
        if not REFUSED.search(str(problem)):
            raise UserError(f"libtpu cannot compile this step: {str(problem).splitlines()[0][:300]}") from None
        memory, refused = _of_refusal(step, dump), True
    return memory, _dumped(dump, "after_optimizations.txt"), refused


def _of_refusal(step: Step, dump: Path) -> Compiled:
    """What a program that does not fit asks for: arguments from shapes, the whole from libtpu's report."""
    held, state = tree_bytes(step.arguments), tree_bytes(step.program.state)[DEVICE]
    report = re.search(
        r"Memory Space: default.*?Total bytes: (\d+)", _dumped(dump, "memory-usage-report.txt"), re.DOTALL
    )
    asked = int(report[1]) if report else 0
    return Compiled(held[DEVICE], state, state, max(asked - held[DEVICE], 0), held[HOST])


def _dumped(dump: Path, ending: str) -> str:
    """The text of the step's own module; smaller ones may have been compiled beside it."""
    files = [path for path in dump.iterdir() if path.name.endswith(ending)]
    return max(files, key=lambda path: path.stat().st_size).read_text(encoding="utf-8")
