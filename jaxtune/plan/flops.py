"""Floating-point operations of matmuls: those that a step's jaxpr does, and those that its model asks for.

A multiplication and an addition are two. What is not a matmul is not counted: it is a few percent at most.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from jaxtune.leaves import Leaf
from jaxtune.models.config import ModelConfig
from jaxtune.models.tiled import TRIPS
from jaxtune.models.weights import HOOKS, Tree, Weight, leaves_with_path


@dataclass(frozen=True)
class Flops:
    """per_device: inside shard_map, where each device does its own; shared: outside, all devices together."""

    per_device: float = 0.0
    shared: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.per_device + other.per_device, self.shared + other.shared)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.per_device * times, self.shared * times)

    def on_each(self, devices: int) -> float:
        """Of one device, when the compiler splits what is shared evenly."""
        return self.per_device + self.shared / devices


@dataclass(frozen=True)
class Place:
    """Where in a program an equation stands.

    shares: how often the dearest branch of a condition is taken, 0 to 1: of an outermost one, of one right in it.
    Conditions further down, or in loops within a condition, are counted as always taken.
    """

    shares: tuple[float, ...] = ()
    is_local: bool = False  # in shard_map
    is_conditional: bool = False

    @property
    def share(self) -> float:
        return self.shares[0] if self.shares else 1.0

    def within(self, primitive: str) -> "Place":
        """Inside an equation of this primitive."""
        if primitive == "cond":
            return Place(self.shares[1:], self.is_local, True)
        shares = () if primitive in ("scan", "while") and self.is_conditional else self.shares
        return Place(shares, self.is_local or primitive == "shard_map", self.is_conditional)


TOP = Place()


def matmul_flops(jaxpr: Any, loop_trips: int = 1, place: Place = TOP) -> Flops:
    """The matmuls of a jaxpr (jax.make_jaxpr's or `jitted.trace(...).jaxpr`), what runs in loops as often as it does.

    loop_trips: how often a `while` runs whose length the data decide, but for those that say it themselves (those of
    attention in tiles). Of a condition the dearest branch counts.
    """
    total = Flops()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        if name in RULES:
            flops = RULES[name](equation)
            total += Flops(per_device=flops) if place.is_local else Flops(shared=flops)
            continue
        parts = [matmul_flops(part, loop_trips, place.within(name)) for part in _jaxprs(equation)]
        if name == "cond":
            total += max(parts, key=lambda part: part.per_device + part.shared) * place.share
        else:
            total += sum(parts, Flops()) * _times(equation, loop_trips)
    return total


def _times(equation: Any, loop_trips: int) -> float:
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name != "while":
        return 1
    said = re.findall(rf"{TRIPS}([\d.]+)", str(equation.source_info.name_stack))
    return float(said[-1]) if said else loop_trips


def _jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs. custom_vjp's rules are functions, not jaxprs, until they are differentiated."""
    for value in equation.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(one, "jaxpr", one), "eqns"):
                yield one


def _dot_general(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[dim] for dim in contracted)


def _ragged_dot(equation: Any) -> float:
    rows, inner = equation.invars[0].aval.shape[-2:]
    return 2.0 * rows * inner * equation.outvars[0].aval.shape[-1]


RULES: dict[str, Callable[[Any], float]] = {"dot_general": _dot_general, "ragged_dot": _ragged_dot}


def model_flops(config: ModelConfig, weights: Tree, mask: Tree, shapes: Tree, tokens: int, time: int) -> float:
    """What a step on `tokens` tokens in rows of `time` asks for, recomputation and padding aside.

    PaLM's count (arXiv 2204.02311, appendix B), which Megatron-LM's MFU follows too: 2 for each matmul parameter and
    token forward, 2 for the gradient of its input and 2 for its own, hence 6 where all trains and 4 for a frozen
    weight below which something trains; and 12 layers x heads x head size x time of attention for each token, the
    causal half included. The embedding is no matmul; the head is one, tied or not. Of what a method adds beside the
    weights, only the matrices of a layer multiply every token.

    weights: the declarations; mask, shapes: of the parameter tree, with a typed leaf's parts.
    """
    below = _frozen_below(mask)
    total = 0.0
    for path, weight in leaves_with_path(weights):
        leaf, train = _at(shapes, path), _at(mask, path)
        if (path[0] == "embed" and not config.tied) or len(weight.shape) < 2:
            continue
        if path[0] == HOOKS or (HOOKS in path and len(weight.shape) > 2):
            continue
        passes = 2.0 if path[:2] in below else 4.0
        trains = any(jax.tree.leaves(train)) and not isinstance(leaf, Leaf)
        total += math.prod(weight.full_shape) * (passes + 2.0 * trains)
        if isinstance(leaf, Leaf):
            added = [getattr(leaf, name) for name in leaf.TRAINS]  # None: a form that this leaf has not
            total += sum(6.0 * a.size for a in added if a is not None and a.ndim >= len(weight.full_shape))
    attention = sum(
        (4.0 if ("stacks", name) in below else 12.0) * _layers(stack) for name, stack in weights["stacks"].items()
    )
    return tokens * (total + attention * config.num_heads * config.head_dim * time)


def _frozen_below(mask: Tree) -> set[tuple[str, str]]:
    """The stacks without a backward pass: nothing in them or in front of them trains."""
    found: set[tuple[str, str]] = set()
    if any(jax.tree.leaves((mask["embed"], mask.get(HOOKS)))):
        return found
    for name, stack in mask["stacks"].items():
        if any(jax.tree.leaves(stack)):
            break
        found.add(("stacks", name))
    return found


def _layers(stack: Tree) -> int:
    weight: Weight = next(leaf for _, leaf in leaves_with_path(stack))
    return len(weight.layers or (0,))


def _at(tree: Tree, path: tuple[str, ...]) -> Any:
    node: Any = tree
    for part in path:
        node = node[part]
    return node
