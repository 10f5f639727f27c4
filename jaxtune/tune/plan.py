"""What a section with targets means for a model: which weights get an adapter, of which rank and scale, and which
train whole.

Made from declarations alone. The names are PEFT's rules' (names.py); every setting that would do nothing is an error.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtune.errors import AdapterError, listing, nearest
from jaxtune.models.weights import Path, Tree, Weight
from jaxtune.section import Targeted
from jaxtune.tune import names
from jaxtune.tune.method import EMBEDDING, all_keys, declared
from jaxtune.tune.names import Modules, module_of

INPUTS = "feedforward_modules"  # IA3's option: the targets whose input is scaled


class Part(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@dataclass(frozen=True)
class Site:
    """The adapters on one weight: one entry in `ranks` and `scales` for each layer, or one where it has no layers.

    Rank 0: no adapter in that layer. A method that knows no ranks has 1 in the others.
    """

    path: Path
    weight: Weight
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def is_embedding(self) -> bool:
        return self.path == EMBEDDING

    @property
    def rank(self) -> int:
        """Of the arrays: the largest."""
        return max(self.ranks)

    @property
    def modules(self) -> list[str]:
        """Full module names, in the order of axis 0."""
        return [module_of(key) for key in self.weight.keys]

    @property
    def in_out(self) -> tuple[int, int]:
        """Sizes of what goes into the weight and of what comes out."""
        return self._turned(*self.weight.shape)

    @property
    def in_out_axes(self) -> tuple[str | None, str | None]:
        """Their logical axes."""
        return self._turned(*self.weight.axes)

    def _turned(self, first, second):
        return (first, second) if self.is_embedding else (second, first)

    def part(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Part:
        """A part of this shape in each layer."""
        return Part(shape, axes) if self.weight.layers is None else Part((len(self.ranks), *shape), ("layers", *axes))


@dataclass(frozen=True)
class Plan:
    sites: dict[Path, Site]
    trained: frozenset[str]  # Hugging Face keys of the weights that train whole: modules to save, and biases
    biases: frozenset[str]  # those of `trained` that are the bias of an adapted module

    @property
    def adapted(self) -> set[str]:
        """Hugging Face keys of the weights with an adapter."""
        ranked = [zip(site.weight.keys, site.ranks) for site in self.sites.values()]
        return {key for pairs in ranked for key, rank in pairs if rank}


def make_plan(section: Targeted, weights: Tree) -> Plan:
    """The plan of a resolved section.

    Raises:
        AdapterError: a name matches nothing, a setting would do nothing, or two settings contradict each other.
    """
    modules = Modules.of(weights)
    _check_patterns(section)
    if section.adapter is None:
        _check_layers(section, modules)
    saved = saved_keys(section, modules, weights)
    targets = _targets(section, modules)
    sites = {}
    for path, weight in declared(weights):
        site = _site(section, path, weight, targets)
        if site is not None:
            sites[path] = site
    own = {f"{name}.bias" for name in targets}
    bias = getattr(section, "bias", "none")
    biases = {key for key in all_keys(weights) if key.endswith(".bias") and (key in own or bias == "all")}
    trained = saved | (biases if bias != "none" else set())
    _check_effects(section, modules, targets, biases)
    _check_conflicts(targets, saved)
    return Plan(sites, frozenset(trained), frozenset(trained & own))


def _site(section: Targeted, path: Path, weight: Weight, targets: set[str]) -> Site | None:
    named = [module_of(key) for key in weight.keys]
    if path[-1] != "weight" or not targets & set(named):
        return None
    ranks = [section.rank_of(name) if name in targets else 0 for name in named]
    scales = [section.scale_of(name) if name in targets else 0.0 for name in named]
    return Site(path, weight, tuple(ranks), tuple(scales))


def _targets(section: Targeted, modules: Modules) -> set[str]:
    """Full names of the modules that get an adapter."""
    if is_all_linear(section.targets):
        section = section.model_copy(update={"targets": names.last_names(modules.linears)})
    named = [name for name in modules.all if names.is_named(name, section.targets)]
    if section.adapter is None:
        _check_each_target(section, modules)
    found = {
        name
        for name in named
        if not (section.exclude and names.is_named(name, section.exclude))
        and not names.in_saved(name, section.modules_to_save)
        and names.in_layers(name, section.targets, section.layers)
    }
    if section.adapter is None and section.exclude is not None:
        check_exclude(section.exclude, named)
    if not found:
        why = "all of them are excluded, saved whole, or in other layers" if named else "no module has such a name"
        hint = "" if named else _hint(section.targets, modules)
        raise AdapterError(f"tune.targets {section.targets!r}: {why}{hint}")
    adaptable = [name for name in modules.adaptable if section.TABLE or name != modules.embedding]
    unfit = [name for name in modules.all if name in found and name not in adaptable]
    if unfit:
        what = "neither a linear map nor the embedding" if section.TABLE else "not a linear map"
        raise AdapterError(
            f"tune.targets {section.targets!r} matches {listing(unfit)}: {what}; "
            f"allowed are {listing(names.last_names(adaptable), 20)}"
        )
    return found


def is_all_linear(targets: list[str] | str) -> bool:
    return isinstance(targets, str) and targets.lower() == names.ALL_LINEAR


def _hint(targets: list[str] | str, modules: Modules) -> str:
    if isinstance(targets, list):
        if any(target.lower() in ("all", names.ALL_LINEAR) for target in targets):
            return f'; "{names.ALL_LINEAR}" stands alone, as text: targets: {names.ALL_LINEAR}'
        hints = dict.fromkeys(names.suggestion(target, modules.adaptable) for target in targets)
        return ("".join(hints) or ".") + f" Allowed are {listing(names.last_names(modules.adaptable), 20)}"
    plain = [name for name in names.last_names(modules.adaptable) if name == targets]
    if plain:
        return f"; a string is a regular expression over the whole name, so write [{targets}]"
    if nearest(targets.lower(), [names.ALL_LINEAR]) or targets.lower() == "all":
        return f'; did you mean "{names.ALL_LINEAR}"?'
    several = [part.strip() for part in targets.split(",")]
    if len(several) > 1 and all(re.fullmatch(r"[\w.]+", part) for part in several):
        return f"; a string is a regular expression over the whole name: write a list: [{', '.join(several)}]"
    return (
        f"{names.suggestion(targets, modules.adaptable) or '.'} A string is a regular expression over the whole name, "
        f"such as {modules.linears[0]}"
    )


def _check_patterns(section: Targeted) -> None:
    """Every regex compiles, in the form in which it is used."""
    inputs = getattr(section, INPUTS, None)
    regexes = {
        "targets": [section.targets] if isinstance(section.targets, str) else [],
        "exclude": [section.exclude] if isinstance(section.exclude, str) else [],
        INPUTS: [inputs] if isinstance(inputs, str) else [],
        **{option: list(getattr(section, option, ())) for option in section.PATTERNS},
        "modules_to_save": section.modules_to_save,
    }
    forms = {**dict.fromkeys(section.PATTERNS, names.PATTERN), "modules_to_save": names.SAVED}
    for option, patterns in regexes.items():
        for pattern in patterns:
            names.compiled(pattern, f"tune.{option}", forms.get(option, "{}"))
    if isinstance(section.targets, str) and not is_all_linear(section.targets) and section.layers is not None:
        raise AdapterError("tune.layers does not go with a regex in tune.targets: put the layers into the regex")


def _check_each_target(section: Targeted, modules: Modules) -> None:
    """Each name of a list matches something by itself."""
    if isinstance(section.targets, str):
        return
    if not section.targets:
        raise AdapterError(f"tune.targets is empty; allowed are {listing(names.last_names(modules.adaptable), 20)}")
    for target in section.targets:
        if not any(names.is_named(name, [target]) for name in modules.all):
            raise AdapterError(f'tune.targets: no module is named "{target}"{_hint([target], modules)}')


def saved_keys(section: Any, modules: Modules, weights: Tree) -> set[str]:
    """Keys of the weights in modules_to_save."""
    holders = [name for name in modules.all if names.is_saved(name, section.modules_to_save)]
    for entry in section.modules_to_save:
        if not any(names.is_saved(name, [entry]) for name in modules.all) and section.adapter is None:
            hint = names.suggestion(entry, modules.all)
            parts = [part for part in names.last_names(modules.all) if not part.isdecimal()]
            raise AdapterError(
                f'tune.modules_to_save: no module is named "{entry}"{hint or "."} Modules are {listing(parts, 30)}'
            )
    starts = tuple(f"{holder}." for holder in holders)
    return {key for key in all_keys(weights) if key.startswith(starts)}


def _check_conflicts(targets: set[str], saved: set[str]) -> None:
    both = sorted(name for name in targets if f"{name}.weight" in saved)
    if both:
        raise AdapterError(
            f"tune.modules_to_save and tune.targets both match {listing(both)}; write whole names in modules_to_save"
        )


def _check_effects(section: Targeted, modules: Modules, targets: set[str], biases: set[str]) -> None:
    """A setting that changes nothing is an error; in an adapter from elsewhere it is what PEFT ignored too."""
    if section.adapter is not None:
        return
    for option in section.PATTERNS:
        patterns = getattr(section, option, {})
        used = {names.pattern_of(name, patterns) for name in targets}
        for pattern in patterns:
            if pattern not in used:
                hint = names.suggestion(pattern, targets)
                raise AdapterError(
                    f'tune.{option}: "{pattern}" decides for no target{hint or ";"} remove or correct it'
                )
    _check_inputs(section, targets)
    bias = getattr(section, "bias", "none")
    if bias != "none" and not biases:
        whose = "the model" if bias == "all" else "a target"
        raise AdapterError(f"tune.bias {bias}: no module of {whose} has a bias; set it to none")
    if getattr(section, "dropout", 0) and targets == {modules.embedding}:
        raise AdapterError("tune.dropout acts on linear maps only, and the only target is the embedding; set it to 0")


def _check_inputs(section: Targeted, targets: set[str]) -> None:
    """Each of IA3's feedforward_modules, or the regex, is a target; those that nobody wrote down may be none."""
    given = getattr(section, INPUTS, None)
    if given is None or given == type(section).model_fields[INPUTS].default:
        return
    for listed in [given] if isinstance(given, str) else [[entry] for entry in given]:
        if not any(names.is_feedforward(target, listed) for target in targets):
            entry = listed if isinstance(listed, str) else listed[0]
            hint = names.suggestion(entry, targets)
            raise AdapterError(
                f'tune.{INPUTS}: "{entry}" is no target{hint or ";"} a list has names, a text is a regular expression'
            )


def check_exclude(exclude: list[str] | str, targeted: list[str]) -> None:
    """Each exclusion takes a target away."""
    if not exclude:
        raise AdapterError("tune.exclude is empty and would exclude nothing; remove it")
    for listed in [exclude] if isinstance(exclude, str) else [[entry] for entry in exclude]:
        if not any(names.is_named(name, listed) for name in targeted):
            entry = listed if isinstance(listed, str) else listed[0]
            hint = names.suggestion(entry, targeted)
            raise AdapterError(f'tune.exclude: "{entry}" excludes no target{hint or ";"} remove or correct it')


def _check_layers(section: Targeted, modules: Modules) -> None:
    if section.layers is None:
        return
    wanted = [section.layers] if isinstance(section.layers, int) else section.layers
    numbers = {int(found["layer"]) for name in modules.linears if (found := names.LAYER_NUMBER.match(name))}
    absent = [str(layer) for layer in wanted if layer not in numbers]
    if absent or not wanted:
        raise AdapterError(f"tune.layers: {listing(absent) or 'an empty list'}; the model has 0 to {max(numbers)}")
