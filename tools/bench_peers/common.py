"""What every side of the benchmark has in common: the specification that it reads, its clock and its answer.

A side is a script with one argument, the path of a specification. What it prints last is its answer, one line of JSON.
Nothing here needs more than Python has, but for what is of JAX sides.
"""

import json
import resource
import statistics
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

STARTED = time.time()  # sides import this module first


@dataclass(frozen=True)
class Spec:
    """What a side is to train, and for how long."""

    model: str  # Hugging Face directory
    rows: str  # file: a list of {"input_ids": [...], "supervised": [0 or 1, ...]}
    method: str  # lora, qlora (over 4 bits, nf4) or full
    length: int  # tokens of a pack or block
    batch: int  # packs or blocks of a step
    steps: int  # timed ones, of `batch * length` tokens; a side whose steps are shorter takes more of them
    warm: int  # steps before the clock starts
    dtype: str  # of computing: float32 on a CPU, bfloat16 on a GPU
    lora: dict  # rank, alpha, dropout, targets
    device: str = "cpu"  # or gpu
    blocks: bool = False  # every row has `length` tokens, and all but the first are supervised
    checkpointing: bool = False  # the torch sides compute activations twice, for want of memory
    jaxtune: str = ""  # jaxtune's own configuration, a file
    overrides: tuple[str, ...] = ()  # of that, section.key=value

    @classmethod
    def read(cls, path: str) -> "Spec":
        found = json.loads(Path(path).read_text())
        return cls(**{one.name: found[one.name] for one in fields(cls) if one.name in found})

    def read_rows(self) -> list[dict]:
        return json.loads(Path(self.rows).read_text())


@dataclass
class Meter:
    """When the steps of a run ended, and the (real, supervised) tokens of each."""

    warm: int
    ends: list[float] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loaded: float = STARTED

    def answer(self, peak_gb: float, compile_seconds: float | None = None) -> str:
        """The line to print. Real tokens: padding is not counted."""
        timed = self.counts[self.warm : len(self.ends)]
        return json.dumps(
            {
                "tokens": sum(tokens for tokens, _ in timed),
                "supervised": sum(supervised for _, supervised in timed),
                "seconds": self.ends[-1] - self.ends[self.warm - 1],
                "peak_gb": peak_gb,
                "load_seconds": self.loaded - STARTED,
                "compile_seconds": compile_seconds,
                "first_step_seconds": self.ends[0] - STARTED,
                "first_loss": self.losses[0],
                "last_loss": self.losses[-1],
            }
        )

    def first_over_later(self) -> float:
        """Seconds that the first step took beyond a usual one: what compiling while it runs takes, about."""
        later = [end - start for start, end in zip(self.ends[1:], self.ends[2:])]
        return max(0.0, self.ends[0] - self.loaded - statistics.median(later))


def host_peak_gb() -> float:
    """The most memory that this process has had in use."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Compiled:
    """Of a JAX side: seconds that XLA has spent compiling, from now on."""

    def __init__(self):
        import jax

        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += seconds


def jax_peak_gb(device: str) -> float:
    """Of a JAX side: on a GPU the most memory that arrays have had there, else that of the process."""
    if device != "gpu":
        return host_peak_gb()
    import jax

    return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9
