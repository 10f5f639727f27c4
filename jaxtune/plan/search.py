"""`jaxtune plan --search`: mesh x zero x remat x offload x micro-batches, estimated all, compiled the best few.

What the user fixed stays: model, tuning method, batch_size, max_length, optimiser, precision. The seconds order the
candidates and are no promise: transfers are added to the matmuls as if nothing overlapped.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import yaml
from pydantic import ValidationError

from jaxtune.config import AXES, Config, MemorySection, MeshSection, make_config
from jaxtune.errors import AdapterError, ConfigError, MeshError, UserError
from jaxtune.mesh import check_time, make_mesh
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.checks import check_fit
from jaxtune.plan.compiling import Plan, compile_step
from jaxtune.plan.estimate import USED, Estimate, Facts, Sizes, estimate, span_of
from jaxtune.plan.program import make_step
from jaxtune.plan.target import Chip, Target

LARGEST = {"tensor": 16, "context": 16, "pipe": 16}  # what is tried of an axis
LONG = 8192  # tokens of a sequence from which on splitting it is tried
REMAT = ("none", "dots", tuple(MemorySection().remat), "block", "full")
WANTED, TRIES, HOPELESS = 3, 10, 3  # plans that fit; compilations at most; at most where nothing should fit


@dataclass(frozen=True)
class Candidate:
    """A configuration with its mesh's sizes and its estimate."""

    config: Config
    sizes: tuple[int, ...]  # in the order of AXES
    guess: Estimate

    @property
    def remat(self) -> str:
        return str(self.config.memory.remat)


@dataclass(frozen=True)
class Found:
    """What a search ends with: plans that fit, best first, and how it got there."""

    plans: list[Plan]
    seconds: list[float]  # estimated from what was compiled
    candidates: int
    compiled: int
    nearest: Plan | None = None  # the smallest that was compiled, where none fits


def search(config: Config, model: ModelConfig, target: Target, budget: int, tell: Callable[[int, str], None]) -> Found:
    """The best few configurations that fit.

    tell: called with (compilations so far, what is compiled next).

    Raises:
        MeshError, AdapterError: no mesh of these devices is legal for the model, the batch and the tuning method.
    """
    facts = Facts(make_step(_on_one_device(config), model, make_mesh(MeshSection(fsdp=1), target.devices[:1])))
    candidates = list(_candidates(config, model, facts, target))
    if not candidates:
        raise MeshError(
            f"no mesh of {len(target.devices)} devices fits this model and train.batch_size {config.train.batch_size}; "
            "jaxtune plan without --search says what is wrong with one of them"
        )
    hunt = _Hunt(candidates, budget, {}, [], [])
    refusal: UserError | None = None
    while (chosen := hunt.next()) is not None:
        try:
            step = make_step(chosen.config, model, make_mesh(chosen.config.mesh, target.devices))
        except (MeshError, AdapterError, ConfigError) as error:  # the method or a kernel is not for this mesh
            refusal = error
            hunt.give_up(chosen.sizes)
            continue
        tell(len(hunt.plans), _words(chosen))
        plan = compile_step(step, target)
        hunt.learn(chosen, plan, _seconds(plan, chosen, target))
    if refusal is not None and not hunt.plans:
        raise refusal
    fitting = sorted(hunt.fitting, key=lambda pair: pair[0])
    smallest = min(hunt.plans, key=lambda plan: plan.memory.peak)
    return Found(
        [plan for _, plan in fitting],
        [seconds for seconds, _ in fitting],
        len(candidates),
        len(hunt.plans),
        None if fitting else smallest,
    )


@dataclass
class _Hunt:
    """What is left to try, and what has been learnt."""

    left: list[Candidate]
    budget: int
    corrections: dict[str, float]  # remat policy -> temporaries compiled / estimated, of the last one
    plans: list[Plan]
    fitting: list[tuple[float, Plan]]  # with seconds

    def next(self) -> Candidate | None:
        """The fastest candidate that should fit; where none should, the smallest, a few times."""
        tries = len(self.plans)
        if not self.left or tries >= TRIES or len(self.fitting) >= WANTED:
            return None
        usual = max(self.corrections.values(), default=1.0)
        peaks = [one.guess.peak(self.corrections.get(one.remat, usual)) for one in self.left]
        should = [one for one, peak in zip(self.left, peaks, strict=True) if peak <= self.budget]
        if should:
            return min(should, key=lambda one: one.guess.seconds)
        if self.fitting or tries >= HOPELESS:
            return None
        return min(zip(peaks, self.left, strict=True), key=lambda pair: pair[0])[1]

    def learn(self, tried: Candidate, plan: Plan, seconds: float) -> None:
        """Take a compiled candidate into account; a mesh that has an answer is not looked at again."""
        self.plans.append(plan)
        self.corrections[tried.remat] = plan.memory.temporaries / tried.guess.temporaries
        if plan.fits(self.budget):
            self.fitting.append((seconds, plan))
            self.give_up(tried.sizes)
        else:
            self.left = [one for one in self.left if one is not tried]

    def give_up(self, sizes: tuple[int, ...]) -> None:
        """Try no more candidates of a mesh."""
        self.left = [one for one in self.left if one.sizes != sizes]


def _seconds(plan: Plan, candidate: Candidate, target: Target) -> float:
    """The estimate, with the matmuls and transfers that were compiled in place of those that were guessed."""
    guess = candidate.guess
    compute = plan.flops / (target.chip.flops * USED) / (1 - plan.step.bubble)
    return replace(guess, compute=compute, network=network_seconds(plan, target.chip)).seconds


def network_seconds(plan: Plan, chip: Chip) -> float:
    """What the transfers of a plan take, one after another."""
    sizes = dict(plan.step.mesh.shape)
    spans = [
        max((span_of(axis, sizes) for axis in one.axes), default=math.prod(sizes.values())) for one in plan.transfers
    ]
    return sum(one.sent / chip.bandwidth(span) for one, span in zip(plan.transfers, spans, strict=True))


def _on_one_device(config: Config) -> Config:
    """The configuration without what a mesh allows."""
    train = config.train.model_copy(update={"micro_batches": 1})
    return config.model_copy(update={"mesh": MeshSection(fsdp=1), "memory": MemorySection(), "train": train})


def _candidates(config: Config, model: ModelConfig, facts: Facts, target: Target) -> Iterator[Candidate]:
    for sizes in meshes(len(target.devices), config.data.max_length):
        for changes in _variants(config, sizes):
            legal = _legal(config, changes, sizes, model)
            if legal is not None:
                yield Candidate(legal, tuple(sizes.values()), estimate(facts, legal, sizes, target.chip))


def meshes(devices: int, time: int) -> Iterator[Sizes]:
    """Every way to spread the devices over the axes, within LARGEST."""
    limits = {**LARGEST, "context": LARGEST["context"] if time >= LONG else 1}

    def spread(left: int, axes: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
        if len(axes) == 1:
            if left <= limits.get(axes[0], left):
                yield (left,)
            return
        for size in range(1, min(left, limits.get(axes[0], left)) + 1):
            if left % size == 0:
                yield from ((size, *rest) for rest in spread(left // size, axes[1:]))

    for sizes in spread(devices, AXES):
        yield dict(zip(AXES, sizes, strict=True))


def _variants(config: Config, sizes: Sizes) -> Iterable[dict]:
    """Sections to put over the configuration, legal or not."""
    batch = config.train.batch_size
    micro = [count for count in range(1, batch + 1) if batch % count == 0]
    zero = (3, 2, 1) if sizes["fsdp"] > 1 else (3,)
    sequence = (True, False) if sizes["tensor"] > 1 else (False,)
    virtual = (1, 2) if sizes["pipe"] > 1 else (1,)
    offload: tuple[list[str], ...] = ([], ["optimizer"])
    for count, level, split, chunks, remat, away in itertools.product(micro, zero, sequence, virtual, REMAT, offload):
        if sizes["pipe"] > 1 and count < sizes["pipe"]:
            continue
        schedule = "interleaved" if chunks > 1 else "1f1b"
        mesh = {"zero": level, "sequence_parallel": split, "virtual_stages": chunks, "schedule": schedule}
        kept = list(remat) if isinstance(remat, tuple) else remat
        yield {"train": {"micro_batches": count}, "mesh": mesh, "memory": {"remat": kept, "offload": away}}
        if isinstance(remat, tuple):
            both = {"remat": kept, "offload": [*away, "activations"]}
            yield {"train": {"micro_batches": count}, "mesh": mesh, "memory": both}


def _legal(config: Config, changes: dict, sizes: Sizes, model: ModelConfig) -> Config | None:
    """The configuration with these sections, if a run would take it."""
    theirs = {} if sizes["context"] == 1 else {"context_attention": config.mesh.context_attention}
    try:
        mesh = MeshSection.model_validate({**sizes, **theirs, **changes["mesh"]})
        memory = MemorySection.model_validate({**config.memory.model_dump(), **changes["memory"]})
    except ValidationError:
        return None
    train = config.train.model_copy(update=changes["train"])
    made = config.model_copy(update={"mesh": mesh, "memory": memory, "train": train})
    return made if _fits_model(made, sizes, model) else None


def _fits_model(config: Config, sizes: Sizes, model: ModelConfig) -> bool:
    mesh: Any = SimpleNamespace(shape=sizes, size=1)
    try:
        check_fit(config, mesh, model)
        check_time(mesh, config.mesh, config.data.max_length)
    except MeshError:
        return False
    return True


def _words(candidate: Candidate) -> str:
    """`fsdp 8, tensor 8, sequence parallel, remat block, 4 micro-batches`."""
    config = candidate.config
    axes = [f"{axis} {size}" for axis, size in zip(AXES, candidate.sizes, strict=True) if size > 1]
    remat = config.memory.remat if isinstance(config.memory.remat, str) else "by name"
    more = [f"zero {config.mesh.zero}"] * (config.mesh.zero < 3)
    more += ["sequence parallel"] * config.mesh.sequence_parallel + ["interleaved"] * (config.mesh.virtual_stages > 1)
    more += [f"remat {remat}", f"{config.train.micro_batches} micro-batches"] + [
        f"offload {name}" for name in config.memory.offload
    ]
    return ", ".join(axes + more)


def pasteable(config: Config, over: Config) -> str:
    """The sections that a search chose, as YAML: without what is both the default and in the configuration that they
    are pasted over, so that they may take the place of its sections or of single keys in them."""
    sections: dict = {"train": {"batch_size": config.train.batch_size, "micro_batches": config.train.micro_batches}}
    default = make_config({"model": {"path": "-"}, "data": {"path": "-"}})
    for name in ("mesh", "memory"):
        chosen, *others = (getattr(one, name).model_dump() for one in (config, default, over))
        sections[name] = {key: value for key, value in chosen.items() if any(value != one[key] for one in others)}
    lines = [
        f"{name}: {yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000).strip()}"
        for name, values in sections.items()
        if values
    ]
    return "\n".join(lines)
