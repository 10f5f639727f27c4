"""Drawing the next token from logits. The filters and their order are those of transformers' logits warpers:
temperature, then top-k, then top-p.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError

COLDEST = 1e-30  # below it no token but the likeliest has a chance, and a logit may become more than float32 holds
Knobs = dict[str, Any]  # numbers that a compiled function takes: changing them compiles nothing anew


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 takes the likeliest one, always the same.

    seed: of the draws; the same seed and prompts give the same text.
    """

    temperature: float = 0.0
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that hold together at least this probability
    seed: int = 0

    def __post_init__(self):
        check("temperature", self.temperature, Real, "0 or more", lambda value: 0 <= value < math.inf)
        if self.top_k is not None:
            check("top_k", self.top_k, Integral, "1 or more", lambda value: value >= 1)
        if self.top_p is not None:
            check("top_p", self.top_p, Real, "above 0, at most 1", lambda value: 0 < value <= 1)
        check("seed", self.seed, Integral, "0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError("top_k and top_p do nothing at temperature 0; set temperature, for example to 0.7")

    @property
    def kind(self) -> str:
        """Which program draws: greedy | plain | filtered."""
        if self.temperature < COLDEST:
            return "greedy"
        return "plain" if self.top_k is None and self.top_p is None else "filtered"

    @property
    def knobs(self) -> Knobs:
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(min(self.top_k or 2**31 - 1, 2**31 - 1)),
            "top_p": np.float32(self.top_p or 1.0),
            "seed": np.uint32(self.seed),
        }


def check(name: str, value: Any, kind: Any, allowed: str, is_good: Callable[[Any], bool]) -> None:
    """Refuse a setting that is no number of this kind, Real or Integral, or not a good one.

    Raises:
        ConfigError: it says what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, kind) or not is_good(value):
        number = "a whole number" if kind is Integral else "a number"
        raise ConfigError(f"{name} {value!r:.80}; allowed: {number}, {allowed}")


GREEDY = Sampling()


def draw(logits: jax.Array, knobs: Knobs, kind: str, count: jax.Array, first_row: Any = 0) -> jax.Array:
    """One token for each row of logits [B, vocab] in float32: [B] int32.

    count: how many tokens were drawn before. A row's draw depends on the seed, the count and the row's number,
    not on how many rows there are. first_row: the number of the first of these.
    """
    if kind == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = warped(logits, knobs, kind)
    key = jax.random.fold_in(jax.random.key(knobs["seed"]), count)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first_row + jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def warped(logits: jax.Array, knobs: Knobs, kind: str) -> jax.Array:
    """The logits [B, vocab] that a token is drawn by; -inf where none may be."""
    logits = logits / knobs["temperature"]
    return top_p(top_k(logits, knobs["top_k"]), knobs["top_p"]) if kind == "filtered" else logits


def top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """logits [B, vocab] with all but the k largest of each row at -inf; those equal to the k-th stay."""
    vocab = logits.shape[-1]
    smallest = jnp.sort(logits, axis=-1)[:, jnp.maximum(vocab - k, 0)]
    return jnp.where(logits < smallest[:, None], -jnp.inf, logits)


def top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """logits [B, vocab] with the unlikeliest tokens, of together at most 1 - p, at -inf; one always stays."""
    order = jnp.argsort(logits, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
    cut = (below <= 1 - p) & (p < 1)
    cut = cut.at[:, -1].set(False)
    return jnp.where(jnp.take_along_axis(cut, jnp.argsort(order, axis=-1), axis=-1), -jnp.inf, logits)
