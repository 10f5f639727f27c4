"""How the weights move: schedules, optimisers, clipping. Not the step that calls them.

The tree here is the trainable one of leaves.partition: nested dicts with None where a weight is frozen.
Gradients may come in any float type; moments and directions are float32 whatever the weights are. With
bfloat16 weights a step below 1/256 of a weight's size rounds away: that is the weights' precision, not ours.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.config import OptimSection
from jaxtune.eight_bit import STACKS, Shapes, scale_by_adam_8bit
from jaxtune.errors import ConfigError
from jaxtune.models.weights import Path, Tree, Weight, names_of

ADAFACTOR_CLIP = 1.0  # root mean square of one weight's update; Shazeer and Stern 2018, section 6
ADAFACTOR_LEAST = 1e-3  # root mean square that a weight is taken for at least; the same paper, section 8
FACTORED = 128  # both sides of a weight whose second moment is factored, at least; optax's


def make_schedule(optim: OptimSection, total_steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate of a step: int32 scalar or array, counted from 1 -> float32 of the same shape.

    Step s has the rate of the s-th optimizer.step() under transformers' get_scheduler, whose counter
    starts at 0: with a warm-up the first step's rate is 0 (wsd: the end's), and the last step's is one
    short of the end. The peer's names: constant_with_warmup, linear, cosine, cosine_with_min_lr,
    warmup_stable_decay. A share of the steps is rounded up, as there. After total_steps the rate stays.

    Raises:
        ConfigError: a length that is neither a share nor a whole number, or a wsd that does not fit.
    """
    warmup = _length("optim.warmup", optim.warmup, total_steps)
    decay = _length("optim.decay", optim.decay, total_steps) if optim.schedule == "wsd" else total_steps - warmup
    if optim.schedule == "wsd" and optim.decay < 1:
        decay = min(decay, max(total_steps - warmup, 1))
    if optim.schedule == "wsd" and optim.decay >= 1 and warmup + decay > total_steps:
        raise ConfigError(
            f"optim.warmup and optim.decay: {warmup} and {decay} steps of a run of {total_steps}; "
            "allowed: a sum of at most all steps; lower one of them"
        )
    start = optim.min_lr if optim.schedule == "wsd" else 0.0

    def schedule(step: Any) -> jax.Array:
        done = jnp.asarray(step, jnp.int32) - 1
        rising = start + (1 - start) * done.astype(jnp.float32) / max(warmup, 1)
        left = jnp.clip(total_steps - done, 0, decay).astype(jnp.float32) / max(decay, 1)
        falling = optim.min_lr + (1 - optim.min_lr) * _shape(optim.schedule, left)
        return optim.lr * jnp.where(done < warmup, rising, falling)

    return schedule


def _length(where: str, value: float, total_steps: int) -> int:
    if value < 1:
        return math.ceil(total_steps * value)
    if value != int(value):
        raise ConfigError(f"{where}: found {value}; allowed: a share below 1, or a whole number of steps")
    return int(value)


def _shape(name: str, left: jax.Array) -> jax.Array:
    """The share of the rate that remains when the share `left` of the decay is still to come."""
    if name == "constant":
        return jnp.ones_like(left)
    if name == "linear":
        return left
    return jnp.square(jnp.sin(0.5 * jnp.pi * left))  # (1 + cos(pi (1 - left))) / 2, exact near the end too


def make_optimizer(
    optim: OptimSection, weights: Tree, sizes: Mapping[str, int] | None = None, shapes: Shapes | None = None
) -> optax.GradientTransformationExtraArgs:
    """The direction of descent: float32, without learning rate and without clipping.

    params - lr * direction is torch's step for adamw, adam (its decay is added to the gradient) and sgd,
    Chen et al. 2023's for lion, and optax.adafactor's, except that its decay is scaled by the rate as
    adamw's is. adamw_8bit is adamw whose moments lie as in bitsandbytes. The rate is the caller's, so a step that
    is skipped leaves nothing behind. Adafactor sees every layer of a stack as a weight of its own; the others work
    on single numbers, or on a row's, and cannot tell.

    weights: the declarations of the whole tree: norms and biases, which have one dimension in a layer, do not decay;
    others do, the parts of a LowRank and a bottleneck adapter's scaling too. sizes: of the mesh's axes, as mesh.shape
    has them; they change no number, only what devices have to tell each other. shapes: of parts that are larger in some
    layers than in others, each layer's (tune.shapes). `update` needs params and, where there are such parts, `numbers`:
    by the same paths, how many each layer has, in the order of axis 0. The zeros that fill a layer up are then no part
    of its weight. Where one layer's is too small for 8-bit moments, or for a factored one, no other's in its stack has
    them.
    """
    shapes = shapes or {}
    decayed = optax.add_decayed_weights(optim.weight_decay, mask=lambda tree: decay_mask(tree, weights))
    adam = _adam(optim.beta1, optim.beta2, optim.eps)
    adam_8bit = scale_by_adam_8bit(optim.beta1, optim.beta2, optim.eps, sizes, shapes)
    pieces = {
        "adamw": lambda: (adam, decayed),
        "adamw_8bit": lambda: (adam_8bit, decayed),
        "adam": lambda: (decayed, adam),
        "sgd": lambda: (decayed, optax.trace(optim.momentum) if optim.momentum else optax.identity()),
        "lion": lambda: (optax.scale_by_lion(optim.beta1, optim.beta2), decayed),
        "adafactor": lambda: (_layer_by_layer(shapes), decayed),
    }
    return _in_float32(optax.chain(*pieces[optim.name]()))


def _adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """optax.scale_by_adam with bias corrections exact in float32: 1 - 0.999 has lost 4 digits there, torch has them."""

    def update(grads, state, params=None):
        count = state.count + 1
        mu = jax.tree.map(lambda g, m: beta1 * m + (1 - beta1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: beta2 * v + (1 - beta2) * jnp.square(g), grads, state.nu)
        mu_rest, nu_rest = (-jnp.expm1(count * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2))
        direction = jax.tree.map(lambda m, v: (m / mu_rest) / (jnp.sqrt(v / nu_rest) + eps), mu, nu)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def _adafactor(factored: bool = True, share: Any = 1.0) -> optax.GradientTransformation:
    """share: of an array's numbers, those that are the weight's; the others are zeros, and belong to no mean."""
    root = share**0.5
    clip = optax.clip_by_block_rms(ADAFACTOR_CLIP * root)
    by_size = optax.scale_by_param_block_rms(ADAFACTOR_LEAST * root)
    moment = optax.scale_by_factored_rms(factored, min_dim_size_to_factor=FACTORED)
    return optax.chain(moment, clip, by_size, optax.scale(1 / root))


def decay_mask(tree: Tree, weights: Tree) -> Tree:
    """For every array of a trainable tree: whether weight decay applies to it."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _decays(path, weights), tree)


def _decays(path: tuple, weights: Tree) -> bool:
    node: Any = weights
    for part in path:
        if isinstance(node, Weight):
            break  # what is left of the path lies inside a typed leaf
        node = node[part.key]
    return len(node.shape) > 1 or node.key.endswith(".scaling")  # by whose name transformers' Trainer lets it decay


def _in_float32(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    def init(params):
        return inner.init(_float32(params))

    def update(grads, state, params, **more):
        return inner.update(_float32(grads), state, _float32(params), **more)

    return optax.GradientTransformationExtraArgs(init, update)


def _float32(tree: Tree) -> Tree:
    return jax.tree.map(lambda array: array.astype(jnp.float32), tree)


def _layer_by_layer(shapes: Shapes) -> optax.GradientTransformationExtraArgs:
    """Adafactor on each array alone, and on each layer of the arrays under "stacks". State: one for each array."""

    def of(path: tuple, share: Any = 1.0) -> optax.GradientTransformation:
        own = [shape for shape in shapes.get(names_of(path), ()) if math.prod(shape)]
        return _adafactor(all(sorted((1, *shape))[-2] >= FACTORED for shape in own), share)

    def init(params):
        def one(path, array):
            return jax.vmap(of(path).init)(array) if path[0].key == STACKS else of(path).init(array)

        return jax.tree_util.tree_map_with_path(one, params)

    def update(grads, state, params, numbers: Mapping[Path, jax.Array] | None = None, **_):
        def one(path, *arrays):
            if path[0].key != STACKS:
                return of(path).update(*arrays)
            if names_of(path) not in shapes:
                return jax.vmap(of(path).update)(*arrays)
            own = (numbers or {})[names_of(path)]
            shares = jnp.where(own > 0, own * own.size / arrays[0].size, 1.0)
            return jax.vmap(lambda share, *layer: of(path, share).update(*layer))(shares, *arrays)

        places, tree = jax.tree_util.tree_flatten_with_path(grads)
        rest = zip(tree.flatten_up_to(state), jax.tree.leaves(params), strict=True)
        done = [one(path, grad, *more) for (path, grad), more in zip(places, rest, strict=True)]
        return tree.unflatten([new for new, _ in done]), tree.unflatten([new for _, new in done])

    return optax.GradientTransformationExtraArgs(init, update)


def state_shardings(state: Any, params: Tree, shardings: Tree) -> Any:
    """A sharding for every array of an optimiser's state, after the weight that it is of.

    state: the state's shapes, as jax.eval_shape(optimizer.init, params) gives them; params, shardings: the
    trainable tree and its NamedShardings. An array of its weight's shape lies as the weight lies; a factor of
    Adafactor's, and the scales of 8-bit blocks, as those dimensions lie that they have; counters are replicated.
    """
    places = jax.tree_util.tree_leaves_with_path(params)
    homes = {path: (array.shape, home) for (path, array), home in zip(places, jax.tree.leaves(shardings), strict=True)}
    mesh = next(home.mesh for _, home in homes.values())

    def choose(path: tuple, array: Any) -> NamedSharding:
        parts = (path[i:j] for i in range(len(path)) for j in range(i + 1, len(path) + 1))
        found = [_home(array.shape, *homes[part], "v_col" in str(path)) for part in parts if part in homes]
        return NamedSharding(mesh, found[0] if found else PartitionSpec())

    return jax.tree_util.tree_map_with_path(choose, state)


def _home(shape: tuple[int, ...], weight: tuple[int, ...], home: NamedSharding, first: bool) -> PartitionSpec:
    """Where an array lies that belongs to a weight. first: of two equal dimensions a factor lacks the first."""
    axes = (*home.spec, *[None] * (len(weight) - len(home.spec)))
    if shape == weight:
        return home.spec
    lacking = [i for i in range(len(weight)) if weight[:i] + weight[i + 1 :] == shape]
    if lacking:
        gone = lacking[0 if first else -1]
        return PartitionSpec(*axes[:gone], *axes[gone + 1 :])
    if len(shape) == len(weight) and shape[:-1] == weight[:-1]:
        # Scales of 8-bit blocks: a row's few are shared out as its numbers are where they divide.
        names = (axes[-1],) if isinstance(axes[-1], str) else axes[-1] or ()
        shares = math.prod(home.mesh.shape[name] for name in names)
        return PartitionSpec(*axes[:-1], None if shape[-1] % shares else axes[-1])
    return PartitionSpec()


def global_norm(tree: Tree) -> jax.Array:
    """The Euclidean norm of all numbers in a tree, summed in float32: a float32 scalar."""
    squares = [jnp.sum(jnp.square(array.astype(jnp.float32))) for array in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def clip(grads: Tree, norm: jax.Array, max_norm: float | None) -> Tree:
    """`grads` in float32, scaled down to max_norm by torch.nn.utils.clip_grad_norm_'s formula; None: as they are.

    norm: the global norm of `grads`.
    """
    if max_norm is None:
        return _float32(grads)
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, _float32(grads))


def descend(params: Tree, direction: Tree, lr: jax.Array) -> Tree:
    """params - lr * direction, computed in float32 and rounded once to each weight's own type."""

    def move(array: jax.Array, towards: jax.Array) -> jax.Array:
        return (array.astype(jnp.float32) - lr * towards).astype(array.dtype)

    return jax.tree.map(move, params, direction)
