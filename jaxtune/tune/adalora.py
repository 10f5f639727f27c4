"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): a low-rank update as P diag(E) Q whose ranks follow from training.

Every triplet (a column of P, a number of E, a row of Q) has a score, from how much its numbers matter to the loss. In
the course of the run ever fewer triplets keep their E, those of the highest scores in the whole model; a penalty keeps
P and Q near to orthogonal. Formulas and names are those of peft 0.21, `RankAllocator` and `AdaLoraModel`.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from jaxtune.errors import ConfigError
from jaxtune.leaves import Axes, Leaf
from jaxtune.models.weights import Tree
from jaxtune.section import Fraction, NonNegative, Positive, PositiveFloat, Targeted
from jaxtune.tune.lora import HARMLESS
from jaxtune.tune.low_rank import LowRank
from jaxtune.tune.method import Course
from jaxtune.tune.peft_files import TARGET_DEFAULTS, TARGET_SETTINGS, Files
from jaxtune.tune.plan import Part, Site, make_plan
from jaxtune.tune.sites import Kind, Start, Tensor, keys_of, site_method

Decay = Annotated[float, Field(gt=0, lt=1)]
DEVIATION = 0.02  # of the first values of A and B


class AdaloraSection(Targeted):
    """Low-rank matrices whose ranks are shared out in training, by what they matter (arXiv 2303.10512)."""

    PATTERNS: ClassVar[tuple[str, ...]] = ()  # its rank_pattern has whole names

    method: Literal["adalora"] = "adalora"
    init_r: Positive = 12  # rank of every adapter at first
    target_r: Positive = 8  # what is left of it on average
    alpha: PositiveFloat = 8  # the update is scaled by alpha / init_r
    dropout: Fraction = 0.0  # on the input of A
    bias: Literal["none", "all", "lora_only"] = "none"  # which biases train as well
    tinit: NonNegative = 0  # steps before the ranks begin to shrink
    tfinal: NonNegative = 0  # steps at the end in which they stay
    deltaT: Positive = 1  # steps from one allocation to the next
    beta1: Decay = 0.85  # of the mean of the scores
    beta2: Decay = 0.85  # of the mean of their changes
    orth_reg_weight: Annotated[float, Field(ge=0)] = 0.5  # of the penalty
    total_step: Positive | None = None  # of the schedule; null: the run's
    rank_pattern: dict[str, list[bool]] = {}  # of a stored adapter: which triplets were left

    @model_validator(mode="after")
    def _check_schedule(self) -> "AdaloraSection":
        if self.target_r > self.init_r and self.adapter is None:  # PEFT loads it; all of them are left then
            raise ValueError(f"target_r {self.target_r} is above init_r {self.init_r}; ranks can only shrink")
        return self

    def triplets(self, module: str) -> list[bool]:
        """A true value for each triplet that a module has, which may be none."""
        return [there for there in self.rank_pattern.get(f"{module}.lora_E", [True] * self.init_r) if there]

    def rank_of(self, module: str) -> int:
        return max(len(self.triplets(module)), 1)

    def scale_of(self, module: str) -> float:
        return self.alpha / (self.init_r + 1e-5)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Triplets(LowRank):
    """A low-rank leaf with a number, e [rank, 1], for each column of `a` and row of `b`."""

    TRAINS: ClassVar[frozenset[str]] = frozenset({"a", "b", "e"})

    e: jax.Array = field(kw_only=True)

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        return {**super().axes(axes, is_table), "e": (*axes[:-2], "rank", None)}

    @property
    def plain(self) -> LowRank:
        """The same as a low-rank leaf of two matrices."""
        return LowRank(self.base, self.a * self.e.swapaxes(-1, -2).astype(self.a.dtype), self.b, self.scale)

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        return self.plain.product(inputs, split)

    def dense(self, is_table: bool) -> Any:
        return self.plain.dense(is_table)


def parts(section: AdaloraSection, site: Site) -> dict[str, Part]:
    (in_size, out_size), (in_axis, out_axis) = site.in_out, site.in_out_axes
    return {
        "a": site.part((in_size, site.rank), (in_axis, "rank")),
        "b": site.part((site.rank, out_size), ("rank", out_axis)),
        "e": site.part((site.rank, 1), ("rank", None)),
        "scale": site.part((), ()),
    }


def start(section: AdaloraSection, site: Site, seed: int) -> Start:
    """A and B normal with deviation 0.02, E zero: nothing changes. In layers without an adapter all are zero."""
    keys = keys_of(site, seed, ".A"), keys_of(site, seed, ".B")
    arrays = *keys, np.array(site.ranks), np.array(site.scales, np.float32)
    return Start(_first, arrays, {"sizes": (*site.in_out, site.rank), "stacked": site.weight.layers is not None})


def _first(keys_a, keys_b, ranks, scales, *, sizes: tuple[int, int, int], stacked: bool) -> dict[str, jax.Array]:
    in_size, out_size, rank = sizes
    lives = jnp.arange(rank)[:, None] < ranks[:, None, None]

    def draw(keys, size):
        return lives * DEVIATION * jax.vmap(lambda key: jax.random.normal(key, (rank, size), jnp.float32))(keys)

    a, b = draw(keys_a, in_size).swapaxes(1, 2), draw(keys_b, out_size)
    made = {"a": a, "b": b, "e": jnp.zeros((len(ranks), rank, 1)), "scale": scales}
    return made if stacked else {name: part[0] for name, part in made.items()}


def leaf(section: AdaloraSection, site: Site, base: Any, made: dict[str, Any]) -> Triplets:
    return Triplets(base, **made, dropout=section.dropout)


def tensors(section: AdaloraSection, site: Site, row: int) -> list[Tensor]:
    (in_size, out_size), rank = site.in_out, len(section.triplets(site.modules[row]))
    shapes = {"a": (rank, in_size), "e": (rank, 1), "b": (out_size, rank)}
    return [Tensor(f"lora_{part.upper()}", shape, part, turned=part != "e") for part, shape in shapes.items()]


def course(section: AdaloraSection, weights: Tree, steps: int) -> Course:
    """The penalty and the allocation of the ranks.

    Raises:
        ConfigError: a schedule that is longer than the run, or leaves no step to share out the ranks in.
    """
    total = section.total_step or steps
    if steps < total:
        raise ConfigError(
            f"tune.total_step {total}: the run has only {steps} steps, so that the ranks would not come down to "
            "tune.target_r; set it to at most that, or leave it out"
        )
    if section.tinit + section.tfinal >= total:
        raise ConfigError(
            f"tune.tinit {section.tinit} and tune.tfinal {section.tfinal} leave none of {total} steps to share out the "
            "ranks in; their sum must be smaller"
        )
    ranks = [len(section.triplets(m)) for s in make_plan(section, weights).sites.values() for m in _adapted(s)]
    end = total - section.tfinal
    table = budgets(sum(ranks), section.target_r * len(ranks), section.tinit, end)
    return Course(partial(penalty, section.orth_reg_weight, len(ranks)), kept, partial(allocated, section, table))


def budgets(first: int, last: int, start: int, end: int) -> np.ndarray:
    """How many triplets live after each step, 0 to `end`, the last that allocates: a cubic fall from `start` on."""
    left = [1 - max(step - start, 0) / (end - start) for step in range(end + 1)]
    return np.array([int((first - last) * share**3 + last) for share in left], np.int32)


def penalty(weight: float, modules: int, trainable: Tree) -> jax.Array:
    """weight times the mean, over A and B of all modules, of |A A^T - 1| and |B^T B - 1| (Frobenius).

    modules: how many have an adapter. One of which no triplet is left adds 0, and counts. The 1 is as large as the
    triplets that a module has.
    """
    norms = []
    for one in _leaves(trainable):
        for form, part, side in (("...ir,...is->...rs", one.a, -2), ("...ro,...so->...rs", one.b, -1)):
            gram = jnp.einsum(form, part, part, precision=jax.lax.Precision.HIGHEST)
            lives = jnp.any(part != 0, axis=side)
            squares = jnp.sum(jnp.square(gram - jnp.eye(gram.shape[-1]) * lives[..., None]), axis=(-2, -1))
            differs = squares > 0  # the root's gradient at 0 is nan
            norms.append(jnp.sum(jnp.where(differs, jnp.sqrt(jnp.where(differs, squares, 1.0)), 0.0)))
    return weight * sum(norms) / (2 * modules)


def kept(trainable: Tree) -> Tree:
    """Of every number how much it matters, on average, and how much that changes; and which triplets have their E."""
    zeros = _of_leaves(lambda one: jax.tree.map(jnp.zeros_like, one), trainable)
    mask = _of_leaves(lambda one: replace(one, a=None, b=None, e=jnp.ones(one.e.shape, bool)), trainable)
    return {"importance": zeros, "change": zeros, "mask": mask}


def allocated(
    section: AdaloraSection,
    table: np.ndarray,
    state: Tree,
    trainable: Tree,
    grads: Tree,
    step: jax.Array,
    good: jax.Array,
) -> tuple[Tree, Tree]:
    """(state, what trains) after a step whose number is counted from 1.

    good: whether it was applied. Where it was not, scores are as they were, and by them ranks are shared out as at any
    other step: the last allocation, say, has no step after it to make up for it.
    """
    end = len(table) - 1
    moves = step < end

    def smooth(beta: float, old: Tree, new: Tree) -> Tree:
        return jax.tree.map(lambda x, y: jnp.where(moves & good, beta * x + (1 - beta) * y, x), old, new)

    matters = jax.tree.map(lambda _, x, grad: jnp.abs(x * grad), state["importance"], *_both(trainable, grads))
    importance = smooth(section.beta1, state["importance"], matters)
    distance = jax.tree.map(lambda x, y: jnp.abs(x - y), matters, importance)
    change = smooth(section.beta2, state["change"], distance)

    scores = [_scores(*three) for three in zip(*map(_leaves, (importance, change, trainable)), strict=True)]
    dropped = int(table[0]) - jnp.asarray(table)[jnp.minimum(step, end)]
    is_due = ((step > section.tinit) & moves & (step % section.deltaT == 0)) | (step == end)
    fresh = iter([place[..., None] >= dropped for place in _places(scores)])
    mask = _of_leaves(lambda one: replace(one, e=jnp.where(is_due, next(fresh), one.e)), state["mask"])
    masks = iter([one.e for one in _leaves(mask)])
    masked = lambda one: replace(one, e=jnp.where((is_due | (step > end)) & ~next(masks), 0, one.e))  # noqa: E731
    return {"importance": importance, "change": change, "mask": mask}, _of_leaves(masked, trainable, keep=True)


def _scores(importance: Triplets, change: Triplets, trained: Triplets) -> jax.Array:
    """Of each triplet [..., rank]; infinite where there is none, as in layers without an adapter."""
    a, b, e = (getattr(importance, part) * getattr(change, part) for part in ("a", "b", "e"))
    score = e[..., 0] + (jnp.mean(a, axis=-2) + jnp.mean(b, axis=-1))
    return jnp.where(jnp.any(trained.a != 0, axis=-2), score, jnp.inf)


def _places(scores: list[jax.Array]) -> list[jax.Array]:
    """Of each score how many of all stand before it, from the lowest up: no two have the same place, so that as many
    triplets as the budget says are left where many matter equally, as all do while E is 0: the last ones in memory."""
    places = jnp.argsort(jnp.argsort(jnp.concatenate([score.reshape(-1) for score in scores])))
    ends = np.cumsum([score.size for score in scores])
    return [part.reshape(score.shape) for part, score in zip(jnp.split(places, ends[:-1]), scores, strict=True)]


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Leaf)


def _leaves(tree: Tree) -> list[Triplets]:
    return [one for one in jax.tree.leaves(tree, is_leaf=_is_leaf) if isinstance(one, Triplets)]


def _of_leaves(function: Any, tree: Tree, keep: bool = False) -> Tree:
    """`function` of every leaf of ours; of the rest nothing or, with `keep`, itself."""
    other = (lambda x: x) if keep else (lambda x: None)
    return jax.tree.map(lambda x: (function if isinstance(x, Triplets) else other)(x), tree, is_leaf=_is_leaf)


def _both(*trees: Tree) -> list[Tree]:
    """Without what is no leaf of ours."""
    return [_of_leaves(lambda one: one, tree) for tree in trees]


def _adapted(site: Site) -> list[str]:
    return [module for module, rank in zip(site.modules, site.ranks) if rank]


SETTINGS = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "bias": "bias",
    **{name: name for name in ("init_r", "target_r", "beta1", "beta2", "orth_reg_weight", "rank_pattern")},
    **TARGET_SETTINGS,
}


SCHEDULE = ("tinit", "tfinal", "deltaT")  # of the run that wrote an adapter, as is total_step: the next has its own


def write(section: AdaloraSection, weights: Tree) -> dict[str, Any]:
    alpha = section.alpha  # which PEFT declares as an integer
    return {
        "fan_in_fan_out": False,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": section.rank_pattern or None,
        **{name: getattr(section, name) for name in SCHEDULE},
        # PEFT wants a number, and its allocator a step before the last one; of what has been trained it says nothing.
        "total_step": section.total_step or section.tinit + section.tfinal + 2,
    }


FILES = Files(  # peft 0.21, `AdaLoraConfig`; its r does nothing
    "ADALORA",
    SETTINGS,
    {"init_r": 12, "alpha": 8, **TARGET_DEFAULTS},
    harmless=HARMLESS | {"init_lora_weights", "r", "total_step", *SCHEDULE},
    write=write,
)
ADALORA = replace(site_method(AdaloraSection, Kind(parts, start, leaf, tensors), FILES), course=course)
