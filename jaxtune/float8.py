"""Linear maps whose three matmuls run in float8: e4m3 operands forward, an e5m2 gradient backward.

Micikevicius et al. 2022, arXiv 2209.05433; the scales are Transformer Engine's. A tensor is multiplied by a scale
that brings its largest number to the type's largest, rounded, and the product is divided by both scales. Current
scaling takes the tensor's own largest number. Delayed scaling takes the largest of the last steps', which are kept in
a history, so that a tensor is rounded as it is made. Not the weights' storage: they stay what they are.

Legend: T tokens, I inputs, O outputs of a linear map, L layers of a stack, H steps of a history.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.leaves import Axes, Leaf, rebased
from jaxtune.models.weights import HOOKS, Path, Tree, leaves_with_path, map_tree, set_path
from jaxtune.parallel import local

STACKS = "stacks"
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
TYPES = (E4M3, E4M3, E5M2)  # of the input, the weight, and the gradient of the output
TOKENS, WEIGHTS = ("data", "fsdp", "context", "tensor"), ("tensor",)  # axes that parts of one tensor lie along


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Float8(Leaf):
    """W, whose matmuls run in float8. It stands in the tree that a pass is given, never in the state.

    base: [out, in]; scales: [3], of input, weight and output gradient, from before this step; None: from the tensors
    themselves. Axis 0 of each part is the layer where W is a stack.
    """

    base: Any
    scales: jax.Array | None = None

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        return {}

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        """x W^T: [..., I] -> [..., O] in x's type. Of a frozen weight no gradient is computed."""
        (x,) = inputs
        y = _matmul(x.reshape(-1, x.shape[-1]), self.base.astype(x.dtype), self.scales)
        return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def _matmul(x_TI: jax.Array, w_OI: jax.Array, scales: jax.Array | None) -> jax.Array:
    """scales: float32 [3], of x, w and the gradient; None: current ones. Its "gradient" is what was seen of them:
    the largest sizes of x, w and the gradient on this device. They are to be combined by maximum, never summed."""
    return _forward(x_TI, w_OI, scales)[0]


def _forward(x_TI, w_OI, scales):
    x, x_size = _rounded(x_TI, E4M3, None if scales is None else scales[0], TOKENS)
    w, w_size = _rounded(w_OI, E4M3, None if scales is None else scales[1], WEIGHTS)
    return _product(x, w, (1, 1), x_TI.dtype), x, w, x_size, w_size


def _matmul_fwd(x, w, scales):
    kept = x.perturbed, w.perturbed
    x, w, scales = jax.tree.map(lambda leaf: leaf.value, (x, w, scales))
    y, x_8, w_8, x_size, w_size = _forward(x, w, scales)
    like = jnp.zeros((), x.dtype), jnp.zeros((), w.dtype)
    return y, (w_8 if kept[0] else None, x_8 if kept[1] else None, scales, x_size, w_size, like)


def _matmul_bwd(residuals, d_TO):
    w, x, scales, x_size, w_size, (x_like, w_like) = residuals
    d, d_size = _rounded(d_TO, E5M2, None if scales is None else scales[2], TOKENS)
    dx = None if w is None else _product(d, w, (1, 0), x_like.dtype)
    dw = None if x is None else _product(d, x, (0, 0), w_like.dtype)
    return dx, dw, None if scales is None else jnp.stack([x_size, w_size, d_size])


_matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


def _rounded(x: jax.Array, kind: Any, scale: jax.Array | None, axes: tuple[str, ...]):
    """((x in `kind`, what divides it again), the largest size of x)."""
    size = jnp.max(jnp.abs(x)).astype(jnp.float32)
    if scale is None:
        scale = scale_of(local.largest(size, *axes), kind)
    return (quantize(x, scale, kind), 1 / scale), size


def quantize(x: jax.Array, scale: jax.Array, kind: Any) -> jax.Array:
    """x * scale, rounded to the nearest in `kind`; past its largest number that one. What is not finite stays so."""
    largest = float(jnp.finfo(kind).max)
    wide = jnp.clip(x.astype(jnp.float32) * scale, -largest, largest)
    return jnp.where(jnp.isfinite(x), wide, x.astype(jnp.float32)).astype(kind)


def scale_of(size: jax.Array, kind: Any) -> jax.Array:
    """The float32 scale that brings `size` to the largest number of `kind`; 1 for a size of 0 or not finite."""
    largest = jnp.minimum(float(jnp.finfo(kind).max) / size, jnp.finfo(jnp.float32).max)
    return jnp.where((size > 0) & jnp.isfinite(size), largest, 1.0)


def _product(a, b, dims: tuple[int, int], dtype: Any) -> jax.Array:
    """a b, contracting these dimensions, added up in float32."""
    (a, a_unscale), (b, b_unscale) = a, b
    contracting = (((dims[0],), (dims[1],)), ((), ()))
    total = jax.lax.dot_general(a, b, contracting, preferred_element_type=jnp.float32)
    return (total * (a_unscale * b_unscale)).astype(dtype)


def wrapped(leaf: Any, scales: jax.Array | None = None) -> Any:
    """A leaf whose base multiplies in float8; adapters beside it do not. A leaf that is one already stays."""
    return leaf if _is_wrapped(leaf) else rebased(leaf, lambda base: Float8(base, scales))


def narrow(params: Tree, weights: Tree) -> Tree:
    """A layer's parameters, its linear maps wrapped. weights: the declarations."""
    return map_tree(lambda leaf, weight: wrapped(leaf) if len(weight.shape) == 2 else leaf, params, weights)


def unwrapped(leaf: Any) -> Any:
    """A leaf whose base multiplies in its own type again: for what is no token, and has other sizes than they."""
    if isinstance(leaf, Float8):
        return leaf.base
    nested = isinstance(leaf, Leaf) and hasattr(leaf, "base")
    return replace(leaf, base=unwrapped(leaf.base)) if nested else leaf


def _is_wrapped(leaf: Any) -> bool:
    return isinstance(leaf, Float8) or (isinstance(leaf, Leaf) and _is_wrapped(getattr(leaf, "base", None)))


@dataclass(frozen=True)
class Watch:
    """The weights whose matmuls have delayed scales, and how long they are remembered: the state of float8.

    layers: path -> layers of the stack; steps: H.
    """

    layers: dict[Path, int] = field(default_factory=dict)
    steps: int = 0

    @classmethod
    def of(cls, weights: Tree, mask: Tree, steps: int, places: int | None = None) -> "Watch":
        """Of the linear maps that a gradient passes: those from the first stack on that trains anything.

        weights: the declarations; mask: what trains, in the structure of the parameters. Below, nothing comes back
        from which a history could be made, and scales are current. places: of the one stack, where a pipeline has
        more of them than layers.
        """
        trains = [name for name, stack in mask[STACKS].items() if any(jax.tree.leaves(stack))]
        below = not any(jax.tree.leaves((mask["embed"], mask.get(HOOKS))))
        first = int(trains[0]) if trains and below else 0 if not below else len(mask[STACKS])
        sites = [(path, leaf) for path, leaf in leaves_with_path(weights) if path[0] == STACKS and HOOKS not in path]
        linear = {path: places or len(weight.layers) for path, weight in sites if len(weight.shape) == 2}
        return cls({path: layers for path, layers in linear.items() if int(path[1]) >= first}, steps)

    def init(self) -> Tree:
        """The histories before the first step: float32 [L, 3, H] of zeros under each path."""
        histories: Tree = {}
        for path, layers in self.layers.items():
            set_path(histories, path, jnp.zeros((layers, len(TYPES), self.steps), jnp.float32))
        return histories


NOTHING = Watch()


def delayed_scales(histories: Tree) -> Tree:
    """[L, 3] for each history: of the largest size in it. Before anything was seen, 1, as in Transformer Engine."""

    def scales(history: jax.Array) -> jax.Array:
        sizes = jnp.max(history, axis=-1)
        return jnp.stack([scale_of(sizes[..., i], kind) for i, kind in enumerate(TYPES)], axis=-1)

    return jax.tree.map(scales, histories)


def attach(params: Tree, scales: Tree) -> Tree:
    """The parameters with delayed scales on the weights that have any; they are differentiated like the weights."""
    return map_tree(lambda leaf, own: leaf if own is None else wrapped(leaf, own), params, scales)


def remember(histories: Tree, sizes: Tree) -> Tree:
    """The histories after a step: its sizes [L, 3], of all devices and micro-batches, in place of the oldest."""
    push = lambda history, size: jnp.concatenate([size[..., None], history[..., :-1]], axis=-1)  # noqa: E731
    return jax.tree.map(push, histories, sizes)
