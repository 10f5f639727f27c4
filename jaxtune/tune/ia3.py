"""IA3 (Liu et al. 2022, arXiv 2205.05638): what a linear map gives, or what a feed-forward one takes, times a vector.

The worked example of CONTRIBUTING.md: all of a method that is not shared is in its one file.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxtune import ops
from jaxtune.errors import AdapterError
from jaxtune.leaves import Axes, Leaf
from jaxtune.models.weights import Tree
from jaxtune.parallel import local
from jaxtune.section import Targeted
from jaxtune.tune import names
from jaxtune.tune.names import Modules, module_of
from jaxtune.tune.peft_files import TARGET_DEFAULTS, TARGET_SETTINGS, Files
from jaxtune.tune.plan import Part, Site, is_all_linear, make_plan
from jaxtune.tune.sites import Kind, Start, Tensor, site_method


class IA3Section(Targeted):
    """A vector for each target, which scales its output or, of a feed-forward module, its input (arXiv 2205.05638)."""

    method: Literal["ia3"] = "ia3"
    targets: list[str] | str = ["k_proj", "v_proj", "down_proj"]  # names, one regex, or all-linear
    feedforward_modules: list[str] | str = ["down_proj"]  # those of the targets whose input is scaled

    def is_feedforward(self, module: str) -> bool:
        return names.is_feedforward(module, self.feedforward_modules)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled(Leaf):
    """(W x + bias) * scale, or with `on_input` W (x * scale) + bias. The map itself adds `bias` afterwards.

    base: [out, in]; scale: [out] or [in]; bias: [out] as the map has it, or None where there is none or it stays.
    """

    TRAINS: ClassVar[frozenset[str]] = frozenset({"scale"})

    base: Any
    scale: jax.Array
    bias: jax.Array | None = None
    on_input: bool = field(default=False, metadata={"static": True})

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        *layers, out_axis, in_axis = axes
        return {"scale": (*layers, in_axis if self.on_input else out_axis), "bias": (*layers, out_axis)}

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        (x,) = inputs
        scale = self.scale.astype(x.dtype)
        if self.on_input:
            return ops.linear(x * scale, self.base, split=split)
        y = ops.linear(x, self.base, split=split) * scale
        if self.bias is None:
            return y
        more = (scale - 1) * self.bias.astype(x.dtype)
        return y + (more if split is None else jnp.where(local.index(split) == 0, more, 0))

    def dense(self, is_table: bool) -> Any:
        scale = self.scale[..., None, :] if self.on_input else self.scale[..., :, None]
        return ops.dense(self.base) * scale

    def dense_bias(self) -> Any:
        return None if self.bias is None else self.bias * self.scale


def parts(section: IA3Section, site: Site) -> dict[str, Part]:
    side = _side(section, site)
    return {"scale": site.part((site.in_out[side],), (site.in_out_axes[side],))}


def _side(section: IA3Section, site: Site) -> int:
    """0 where the input is scaled, 1 where the output is."""
    sides = {
        module: 0 if section.is_feedforward(module) else 1 for module, rank in zip(site.modules, site.ranks) if rank
    }
    if len(set(sides.values())) > 1:
        module = next(module for module, side in sides.items() if side == 0)
        raise AdapterError(
            f"tune.feedforward_modules {section.feedforward_modules!r}: of {module.rpartition('.')[2]} some layers are "
            "feed-forward and others are not; name the module for all layers"
        )
    return next(iter(sides.values()))


def start(section: IA3Section, site: Site, seed: int) -> Start:
    """Ones: nothing changes."""
    shape = parts(section, site)["scale"].shape
    return Start(_ones, (), {"shape": shape})


def _ones(*, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    return {"scale": jnp.ones(shape, jnp.float32)}


def leaf(section: IA3Section, site: Site, base: Any, made: dict[str, Any]) -> Scaled:
    on_input = _side(section, site) == 0
    return Scaled(base, made["scale"], None if on_input else made.get("bias"), on_input)


def tensors(section: IA3Section, site: Site, row: int) -> list[Tensor]:
    side = _side(section, site)
    size = site.in_out[side]
    return [Tensor("ia3_l", (1, size) if side == 0 else (size, 1), "scale")]


def read(tree: dict[str, Any], where: Path) -> dict[str, Any]:
    if tree.get("feedforward_modules") is None:
        raise AdapterError(f"{where}: feedforward_modules is missing; it must list the modules whose input is scaled")
    return {"feedforward_modules": tree["feedforward_modules"]}


def write(section: IA3Section, weights: Tree) -> dict[str, Any]:
    """PEFT wants listed feed-forward modules to be some of the listed targets, in the same words, and takes a regex."""
    named, targets = section.feedforward_modules, section.targets
    modules = [module_of(key) for key in make_plan(section, weights).adapted]
    if section.layers is not None:
        named = sorted(module for module in modules if section.is_feedforward(module))
    elif isinstance(named, list):
        named = [end for end in named if any(names.is_feedforward(module, [end]) for module in modules)]
        listed = names.last_names(Modules.of(weights).linears) if is_all_linear(targets) else targets
        if isinstance(listed, list) and not set(named) <= set(listed):
            named = f".*({'|'.join(map(re.escape, named))})"
    return {"fan_in_fan_out": False, "feedforward_modules": named}


FILES = Files(  # peft 0.21, `IA3Config`
    "IA3",
    {name: ours for name, ours in TARGET_SETTINGS.items() if ours != "layers"},
    TARGET_DEFAULTS,
    harmless=frozenset({"init_ia3_weights", "feedforward_modules"}),
    read=read,
    write=write,
    fill={"scale": 1.0},
)
IA3 = site_method(IA3Section, Kind(parts, start, leaf, tensors, takes_bias=True), FILES)
