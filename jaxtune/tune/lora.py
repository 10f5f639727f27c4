"""LoRA (arXiv 2106.09685): frozen weights become `LowRank` leaves, whose `a` and `b` train.

Which weights is plan.py's, the leaf low_rank.py's, adapter files are peft_io.py's.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import model_validator

from jaxtune.errors import AdapterError
from jaxtune.models.weights import Tree, Weight
from jaxtune.section import Fraction, Positive, PositiveFloat, Targeted
from jaxtune.tune import names
from jaxtune.tune.low_rank import LowRank
from jaxtune.tune.peft_files import TARGET_DEFAULTS, TARGET_SETTINGS, Files
from jaxtune.tune.plan import Part, Site
from jaxtune.tune.sites import Kind, Start, Tensor, keys_of, site_method


class Ranked(Targeted):
    """Options of the methods that add two narrow matrices."""

    rank: Positive = 8
    alpha: PositiveFloat = 16  # the update is scaled by alpha / rank
    dropout: Fraction = 0.0  # on the input of A
    use_rslora: bool = False  # scale alpha / sqrt(rank) in place of alpha / rank
    bias: Literal["none", "all", "lora_only"] = "none"  # which biases train as well
    rank_pattern: dict[str, Positive] = {}  # module name or regex -> rank
    alpha_pattern: dict[str, PositiveFloat] = {}
    loraplus_lr_ratio: PositiveFloat | None = None  # LoRA+: B's learning rate as a multiple of A's, which is optim.lr
    loraplus_lr_embedding: PositiveFloat = 1e-6  # LoRA+: that of both matrices on the embedding

    @model_validator(mode="after")
    def _check_loraplus(self) -> "Ranked":
        default = Ranked.model_fields["loraplus_lr_embedding"].default
        if self.loraplus_lr_ratio is None and self.loraplus_lr_embedding != default:
            raise ValueError("loraplus_lr_embedding would do nothing without loraplus_lr_ratio")
        return self

    def rank_of(self, module: str) -> int:
        return names.by_pattern(module, self.rank_pattern, self.rank)

    def scale_of(self, module: str) -> float:
        alpha = names.by_pattern(module, self.alpha_pattern, self.alpha)
        return alpha / math.pow(self.rank_of(module), 0.5 if self.use_rslora else 1.0)


class Drawn(Ranked):
    """Options of those of them that can sit on the embedding too, and start with random numbers."""

    TABLE: ClassVar[bool] = True

    init: Literal["default", "gaussian"] = "default"  # of A; B starts at zero


class LoraSection(Drawn):
    """Low-rank matrices beside frozen weights (Hu et al. 2021, arXiv 2106.09685).

    use_rslora: Kalajdzievski 2023, arXiv 2312.03732. loraplus_lr_ratio: Hayou et al. 2024, arXiv 2402.12354.
    """

    method: Literal["lora"] = "lora"


def lora_parts(section: Ranked, site: Site) -> dict[str, Part]:
    """The axes follow from the base weight's."""
    (in_size, out_size), (in_axis, out_axis) = site.in_out, site.in_out_axes
    return {
        "a": site.part((in_size, site.rank), (in_axis, "rank")),
        "b": site.part((site.rank, out_size), ("rank", out_axis)),
        "scale": site.part((), ()),
    }


def fresh(section: Drawn, site: Site, seed: int) -> Start:
    """The adapters' first values as PEFT draws them, so that every product is zero.

    Linear: b = 0 and a uniform in +-1/sqrt(in), or normal with deviation 1/rank ("gaussian"). Embedding: a = 0
    and b normal with deviation 1.
    """
    kind = "embedding" if site.is_embedding else section.init
    sizes, has_layers = (*site.in_out, site.rank), site.weight.layers is not None
    arrays = keys_of(site, seed), np.array(site.ranks), np.array(site.scales, np.float32)
    return Start(initial, arrays, {"sizes": sizes, "kind": kind, "stacked": has_layers})


def initial(keys, ranks, scales, *, sizes: tuple[int, int, int], kind: str, stacked: bool) -> dict[str, jax.Array]:
    """`a`, `b` and `scale` of one leaf, from a key, a rank and a scale for each layer.

    Drawn row by row of the rank, so that a layer's numbers do not depend on the largest rank of its stack.
    """
    in_size, out_size, rank = sizes
    draw = partial(jax.random.uniform, minval=-1.0, maxval=1.0) if kind == "default" else jax.random.normal
    shape = (rank, out_size if kind == "embedding" else in_size)
    draws = jax.vmap(lambda key: draw(key, shape, jnp.float32))(keys)
    ranks = ranks[:, None, None]
    if kind != "embedding":
        draws = draws / math.sqrt(in_size) if kind == "default" else draws / jnp.maximum(ranks, 1)
    draws = jnp.where(jnp.arange(rank)[:, None] < ranks, draws, 0.0)
    if kind == "embedding":
        a, b = jnp.zeros((len(keys), in_size, rank)), draws
    else:
        a, b = draws.swapaxes(1, 2), jnp.zeros((len(keys), rank, out_size))
    parts = {"a": a, "b": b, "scale": scales}
    return parts if stacked else {name: part[0] for name, part in parts.items()}


def lora_leaf(section: Ranked, site: Site, base: Any, parts: dict[str, Any]) -> LowRank:
    return LowRank(base, **parts, dropout=section.dropout)


def lora_tensors(section: Ranked, site: Site, row: int) -> list[Tensor]:
    (in_size, out_size), rank = site.in_out, site.ranks[row]
    a, b = ("lora_embedding_A", "lora_embedding_B") if site.is_embedding else ("lora_A.weight", "lora_B.weight")
    return [Tensor(a, (rank, in_size), "a", turned=True), Tensor(b, (out_size, rank), "b", turned=True)]


# Source of the keys: peft 0.21, `LoraConfig` and `PeftConfigMixin`. Written are those that PEFT had in 2023, since a
# PEFT older than 0.19 fails on a key that it does not know.
SETTINGS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "bias": "bias",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    **TARGET_SETTINGS,
}
DEFAULTS: dict[str, Any] = {  # PEFT's, in our names
    "rank": 8,
    "alpha": 8,
    "dropout": 0.0,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    **TARGET_DEFAULTS,
}
HARMLESS = frozenset({"eva_config", "megatron_core", "qalora_group_size", "runtime_config"})
# Starts that leave the base weights as they are. Most others (pissa, olora, corda, ...) subtract the start from
# them, so that the adapter belongs to a base that is not the model's; mica keeps B fixed in training.
HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_lora(tree: dict[str, Any], where: Path) -> dict[str, Any]:
    """Of `init_lora_weights`, which is all that takes more than a new name."""
    init = tree.get("init_lora_weights")
    if not any(init is allowed or init == allowed for allowed in HARMLESS_INITS):
        raise AdapterError(
            f"{where}: init_lora_weights {init!r} changes the base weights or how the adapter trains; allowed are "
            "true, false, 'gaussian', 'eva' and 'orthogonal'. PEFT's save_pretrained converts such an adapter "
            "when it is given path_initial_model_for_weight_conversion"
        )
    return {"init": "gaussian" if init == "gaussian" else "default"}


def write_lora(section: Ranked, weights: Tree) -> dict[str, Any]:
    return {
        "fan_in_fan_out": False,
        "layers_pattern": None,
        "init_lora_weights": "gaussian" if getattr(section, "init", None) == "gaussian" else True,
        "lora_alpha": whole_number(section.alpha),
        "alpha_pattern": {name: whole_number(value) for name, value in section.alpha_pattern.items()},
    }


def whole_number(number: float) -> int | float:
    """PEFT declares alpha as an integer."""
    return int(number) if number == int(number) else number


def lora_rate(section: Ranked, weight: Weight, part: str | None, lr: float) -> float:
    """LoRA+ as in peft's create_loraplus_optimizer: B and all that has one dimension in a layer are of one group."""
    if section.loraplus_lr_ratio is None:
        return 1.0
    if weight.is_table and part in ("a", "b"):
        return section.loraplus_lr_embedding / lr
    is_vector = len(weight.shape) == 1 if part is None else part == "magnitude"
    return section.loraplus_lr_ratio if part == "b" or is_vector else 1.0


LORA_FILES = Files(
    "LORA", SETTINGS, DEFAULTS, harmless=HARMLESS | {"init_lora_weights"}, read=read_lora, write=write_lora
)
LORA_KIND = Kind(parts=lora_parts, start=fresh, leaf=lora_leaf, tensors=lora_tensors)
LORA = site_method(LoraSection, LORA_KIND, LORA_FILES, rate=lora_rate)
