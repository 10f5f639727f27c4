"""What LoHa and LoKr share: their options, how PEFT's files name them, and how numbers are drawn."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.section import Positive, PositiveFloat, Targeted
from jaxtune.tune import names
from jaxtune.tune.lora import whole_number
from jaxtune.tune.peft_files import TARGET_DEFAULTS, TARGET_SETTINGS


class Lycoris(Targeted):
    """Options of both."""

    rank: Positive = 8
    alpha: PositiveFloat = 8  # the update is scaled by alpha / rank
    rank_pattern: dict[str, Positive] = {}  # module name or regex -> rank
    alpha_pattern: dict[str, PositiveFloat] = {}

    def rank_of(self, module: str) -> int:
        return names.by_pattern(module, self.rank_pattern, self.rank)

    def scale_of(self, module: str) -> float:
        return names.by_pattern(module, self.alpha_pattern, self.alpha) / self.rank_of(module)


# Source of the keys: peft 0.21, `LycorisConfig`.
SETTINGS = {
    "r": "rank",
    "alpha": "alpha",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    **TARGET_SETTINGS,
}
DEFAULTS: dict[str, Any] = {"rank": 8, "alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, **TARGET_DEFAULTS}


def written(section: Lycoris) -> dict[str, Any]:
    """Keys besides the settings."""
    patterns = {name: whole_number(value) for name, value in section.alpha_pattern.items()}
    return {"init_weights": True, "alpha": whole_number(section.alpha), "alpha_pattern": patterns}


def uniform(keys: jax.Array, number: int, ranks: jax.Array, shape: tuple[int, int], bounds: Any) -> jax.Array:
    """[layers, rank, size]: uniform in +-bounds, zero from a layer's rank on.

    number: of the matrix, so that each has other draws. Drawn row by row of the rank, so that a layer's numbers do not
    depend on the largest rank of its stack. bounds: [layers], or one for all.
    """
    draw = lambda key: jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -1.0, 1.0)  # noqa: E731
    rows = jnp.arange(shape[0]) < ranks[:, None]
    return jnp.where(rows[..., None], jax.vmap(draw)(keys) * jnp.reshape(bounds, (-1, 1, 1)), 0.0)
