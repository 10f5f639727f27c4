"""What a tuning method is, and what all of them share. A method is a file beside this one and a row in `METHODS`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Sharding

from jaxtune.models.weights import Path, Tree, Weight, leaves_with_path
from jaxtune.once import run_once
from jaxtune.parallel import local
from jaxtune.section import TuneSection

if TYPE_CHECKING:
    from jaxtune.models.config import ModelConfig
    from jaxtune.models.hooks import Hooks
    from jaxtune.quant.scheme import AtLoad
    from jaxtune.tune.peft_files import Files

ShardingOf = Callable[[tuple[int, ...], tuple[str | None, ...]], Sharding]  # (shape, logical axes) -> sharding


@dataclass(frozen=True)
class Course:
    """What a method does in training besides descending. Trees are whole arrays, as what trains lies between steps.

    penalty: what trains -> a float32 scalar that is added to the loss. kept: what trains -> a state, saved with the
    rest; an array of it that is of one in what trains has that one's shape and, within the state, its path.
    after: (state, what trains, its clipped gradients, the step's number, whether it was applied) -> (state, what
    trains), after the optimiser. Where it was not, the gradients may be no numbers.
    """

    penalty: Callable[[Tree], jax.Array]
    kept: Callable[[Tree], Tree]
    after: Callable[[Tree, Tree, Tree, jax.Array, jax.Array], tuple[Tree, Tree]]


Rate = Callable[[Any, Weight, str | None, float], float]

EMBEDDING = ("embed", "weight")
HEAD = ("head", "weight")


@dataclass(frozen=True)
class Method:
    """A transform of the parameter tree, and what it says about itself before there are parameters.

    section: the class of its options. In what follows, `section` is one of these, and `weights` the declarations.

    trained: (section, weights) -> keys of the weights whose own values train: Hugging Face's, or those that `hooks`
    declares. adapted: likewise, of the weights that stay as they are and carry something that trains.
    wrap: (section, params, weights, seed, sharding_of) -> params with the method's typed leaves, as they start.
    needs_tokenizer: wrap takes the model's tokenizer after these.
    rebases: it starts from the weights and takes its start away from them, so that both depend on the weights' type.
    separates: a head tied to the embedding becomes a weight of its own where either is trained or adapted.
    files: how PEFT stores it; None: it ends in a whole model, not in an adapter.
    hooks: (section, model settings) -> what it adds to the decoder beside the weights; None: nothing.
    quantized: (section, weights, weight, how weights are quantised as they are loaded) -> array -> the leaf of a weight
    that the method quantises in its own way; None: none.
    course: (section, weights, steps of the run) -> what it does in training besides descending; None: nothing.
    rate: (section, weight, name of a leaf's part or None, learning rate) -> what that rate is multiplied by.
    words: (section, tokenizer) -> the tokenizer with tokens that the method adds, and the section with what it needs of
    them; it is given a tokenizer of its own. vocab_size: (section, model settings) -> rows of the tables then.
    """

    section: type[TuneSection]
    trained: Callable[[Any, Tree], set[str]]
    adapted: Callable[[Any, Tree], set[str]] = lambda section, weights: set()
    wrap: Callable[..., Tree] = lambda section, params, *rest: params
    rebases: bool = False
    separates: bool = False
    files: "Files | None" = None
    needs_tokenizer: bool = False
    hooks: "Callable[[Any, ModelConfig], Hooks | None]" = lambda section, config: None
    quantized: Callable[[Any, Tree, Weight, "AtLoad"], Callable | None] = lambda section, weights, weight, scheme: None
    course: Callable[[Any, Tree, int], Course | None] = lambda section, weights, steps: None
    rate: Rate = lambda section, weight, part, lr: 1.0
    words: Callable[[Any, Any], tuple[Any, Any]] = lambda section, tokenizer: (tokenizer, section)
    vocab_size: "Callable[[Any, ModelConfig], int]" = lambda section, config: config.vocab_size


def declared(weights: Tree) -> Iterator[tuple[Path, Weight]]:
    """Every declaration with its path."""
    return leaves_with_path(weights)


def all_keys(weights: Tree) -> list[str]:
    """Every Hugging Face key, in the declarations' order."""
    return [key for _, weight in declared(weights) for key in weight.keys]


def get_path(tree: Tree, path: Path) -> Any:
    """What lies at `path`; None where nothing does."""
    for part in path:
        if part not in tree:
            return None
        tree = tree[part]
    return tree


def is_abstract(params: Tree) -> bool:
    """Whether the tree holds shapes in place of arrays."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def is_concrete(params: Tree) -> bool:
    """Whether the arrays have values: neither shapes nor traced."""
    return not is_abstract(params) and not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params))


def make(function: Callable, shardings: Any, abstract: bool, *arrays: Any, **settings: Any) -> Any:
    """The tree that `function` makes of arrays and static settings, each array in its own shards.

    The arrays may lie in the host's memory. Where `abstract`, the shapes alone.
    """
    if not abstract:
        return run_once(_near(function), *arrays, shardings=shardings, **settings)
    shapes = jax.eval_shape(partial(_near(function), **settings), *arrays)
    if shardings is None:
        return shapes
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)


@lru_cache(64)  # one for each function: what is compiled is found again by it
def _near(function: Callable) -> Callable:
    """`function` of arrays that come to the device first."""
    return lambda *arrays, **settings: function(*jax.tree.map(local.near, arrays), **settings)
