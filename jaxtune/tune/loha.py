"""LoHa: the update of a frozen weight is the product, number by number, of two low-rank matrices.

Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098; Yeh et al. 2023 (LyCORIS), arXiv 2309.14859.

Legend: T tokens, I inputs, O outputs of a map; R rank, Q = R^2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import ops
from jaxtune.leaves import Axes, Leaf
from jaxtune.models.weights import Tree
from jaxtune.tune.lycoris import DEFAULTS, SETTINGS, Lycoris, uniform, written
from jaxtune.tune.peft_files import Files
from jaxtune.tune.plan import Part, Site
from jaxtune.tune.sites import Kind, Start, Tensor, keys_of, site_method


class LohaSection(Lycoris):
    """The Hadamard product of two low-rank updates (Hyeon-Woo et al. 2021, arXiv 2108.06098)."""

    method: Literal["loha"] = "loha"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hadamard(Leaf):
    """W + scale * (w1_a w1_b) * (w2_a w2_b), the middle product number by number. Axis 0 is the layer in a stack.

    base: [O, I]; w1_a, w2_a: [O, R]; w1_b, w2_b: [R, I]; scale: scalar. Layers that have a smaller rank, or none, hold
    zeros in the columns and rows that they lack: all their gradients are zero there.
    """

    TRAINS: ClassVar[frozenset[str]] = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})

    base: Any
    w1_a: jax.Array
    w1_b: jax.Array
    w2_a: jax.Array
    w2_b: jax.Array
    scale: jax.Array

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        *layers, out_axis, in_axis = axes
        left, right = (*layers, out_axis, "rank"), (*layers, "rank", in_axis)
        return {"w1_a": left, "w1_b": right, "w2_a": left, "w2_b": right, "scale": tuple(layers)}

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        (x,) = inputs
        factors = (w.astype(x.dtype) for w in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        added = update(x.reshape(-1, x.shape[-1]), *factors) * self.scale.astype(x.dtype)
        return ops.linear(x, self.base, split=split) + added.reshape(*x.shape[:-1], -1)

    def dense(self, is_table: bool) -> Any:
        first, second = (
            jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            for a, b in ((self.w1_a, self.w1_b), (self.w2_a, self.w2_b))
        )
        return ops.dense(self.base) + self.scale[..., None, None] * first * second


@jax.custom_vjp
def update(x_TI: jax.Array, w1_OR: jax.Array, w1_RI: jax.Array, w2_OR: jax.Array, w2_RI: jax.Array) -> jax.Array:
    """x ((w1 w1) * (w2 w2))^T. The backward pass makes what is between again and keeps only what comes in."""
    return _update(x_TI, w1_OR, w1_RI, w2_OR, w2_RI)


def _update(x_TI, w1_OR, w1_RI, w2_OR, w2_RI):
    """The product of two matrices of rank R, number by number, has rank R^2 at most: while that is small, it is two
    narrow matrices, whose columns and rows are products of one of each, and is not formed itself."""
    (outputs, rank), inputs = w1_OR.shape, w1_RI.shape[1]
    if rank**2 * (inputs + outputs) >= inputs * outputs:
        return ops.linear(x_TI, (w1_OR @ w1_RI) * (w2_OR @ w2_RI))
    b_QI = (w1_RI[:, None] * w2_RI[None]).reshape(-1, inputs)
    a_OQ = (w1_OR[:, :, None] * w2_OR[:, None]).reshape(outputs, -1)
    return ops.linear(ops.linear(x_TI, b_QI), a_OQ)


def _update_fwd(*inputs):
    return _update(*inputs), inputs


def _update_bwd(inputs, d_TO):
    # The barrier keeps XLA from sharing what the forward pass has made, and holding it until here.
    inputs, d_TO = jax.lax.optimization_barrier((inputs, d_TO))
    return jax.vjp(_update, *inputs)[1](d_TO)


update.defvjp(_update_fwd, _update_bwd)


def loha_parts(section: LohaSection, site: Site) -> dict[str, Part]:
    """The axes follow from the base weight's."""
    (in_size, out_size), (in_axis, out_axis) = site.in_out, site.in_out_axes
    left = site.part((out_size, site.rank), (out_axis, "rank"))
    right = site.part((site.rank, in_size), ("rank", in_axis))
    return {"w1_a": left, "w1_b": right, "w2_a": left, "w2_b": right, "scale": site.part((), ())}


def fresh(section: LohaSection, site: Site, seed: int) -> Start:
    """As PEFT draws them: uniform in +-1/sqrt(columns), but for w2_b, which is zero."""
    arrays = keys_of(site, seed), np.array(site.ranks), np.array(site.scales, np.float32)
    sizes = (*site.in_out, site.rank)
    return Start(_initial, arrays, {"sizes": sizes, "in_layers": site.weight.layers is not None})


def _initial(keys, ranks, scales, *, sizes: tuple[int, int, int], in_layers: bool) -> dict[str, jax.Array]:
    in_size, out_size, rank = sizes
    roots = jnp.maximum(ranks, 1) ** -0.5
    w1_a, w2_a = (uniform(keys, i, ranks, (rank, out_size), roots).swapaxes(1, 2) for i in (0, 1))
    w1_b = uniform(keys, 2, ranks, (rank, in_size), in_size**-0.5)
    parts = {"w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": jnp.zeros_like(w1_b), "scale": scales}
    return parts if in_layers else {name: part[0] for name, part in parts.items()}


def loha_leaf(section: LohaSection, site: Site, base: Any, parts: dict[str, Any]) -> Hadamard:
    return Hadamard(base, **parts)


def loha_tensors(section: LohaSection, site: Site, row: int) -> list[Tensor]:
    (in_size, out_size), rank = site.in_out, site.ranks[row]
    shapes = {"a": (out_size, rank), "b": (rank, in_size)}
    return [Tensor(f"hada_w{n}_{side}", shape, f"w{n}_{side}") for n in (1, 2) for side, shape in shapes.items()]


def write_loha(section: LohaSection, weights: Tree) -> dict[str, Any]:
    return written(section)


LOHA_KIND = Kind(parts=loha_parts, start=fresh, leaf=loha_leaf, tensors=loha_tensors)
LOHA_FILES = Files("LOHA", SETTINGS, DEFAULTS, harmless=frozenset({"init_weights"}), write=write_loha)
LOHA = site_method(LohaSection, LOHA_KIND, LOHA_FILES)
