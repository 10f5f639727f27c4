"""Methods that train small weights of the model itself and add none: its norms, or its biases."""

from typing import Literal

from jaxtune.errors import AdapterError, listing
from jaxtune.models.weights import Path, Tree, Weight
from jaxtune.section import Adapting, TuneSection
from jaxtune.tune import names
from jaxtune.tune.method import Method, ShardingOf, all_keys, declared
from jaxtune.tune.names import Modules, module_of
from jaxtune.tune.peft_files import PREFIX, Entry, Files, whole_entries
from jaxtune.tune.plan import Plan, check_exclude, saved_keys
from jaxtune.tune.sites import widened


class LayerNormSection(Adapting):
    """The weights of norms train (Zhao et al. 2023, arXiv 2312.11420)."""

    method: Literal["layernorm"] = "layernorm"
    targets: list[str] | str = ["input_layernorm", "post_attention_layernorm", "norm"]  # names, or one regex
    exclude: list[str] | str | None = None  # names or one regex
    modules_to_save: list[str] = []  # trained in full as well


class BitFitSection(TuneSection):
    """Every bias of the model trains (Ben Zaken et al. 2021, arXiv 2106.10199)."""

    method: Literal["bitfit"] = "bitfit"


def _norms(weights: Tree) -> dict[str, str]:
    """Module name -> key of every norm's weight."""
    found = [weight for path, weight in declared(weights) if path[-1] == "weight" and len(weight.shape) == 1]
    return {module_of(key): key for weight in found for key in weight.keys}


def target_norms(section: LayerNormSection, weights: Tree) -> set[str]:
    """Keys of the norms that train.

    Raises:
        AdapterError: a name matches nothing, or something that is no norm.
    """
    norms, modules = _norms(weights), Modules.of(weights)
    _check_names(section.targets, norms, modules)
    if isinstance(section.exclude, str):
        names.compiled(section.exclude, "tune.exclude")
    for entry in section.modules_to_save:
        names.compiled(entry, "tune.modules_to_save", names.SAVED)
    found = [name for name in modules.all if names.is_named(name, section.targets)]
    if section.exclude is not None and section.adapter is None:
        check_exclude(section.exclude, found)
    found = [name for name in found if not (section.exclude and names.is_named(name, section.exclude))]
    found = [name for name in found if not names.in_saved(name, section.modules_to_save)]
    others = [name for name in found if name not in norms]
    if others or not found:
        why = f"matches {listing(others)}, no norm" if others else "leaves no norm to train"
        raise AdapterError(f"tune.targets {section.targets!r} {why}; norms are {listing(names.last_names(norms))}")
    return {norms[name] for name in found}


def _check_names(given: list[str] | str, norms: dict[str, str], modules: Modules) -> None:
    """Each name, or the regex, matches a module."""
    if isinstance(given, str):
        names.compiled(given, "tune.targets")
    for listed in [given] if isinstance(given, str) else [[entry] for entry in given]:
        if not any(names.is_named(name, listed) for name in modules.all):
            entry = listed if isinstance(listed, str) else listed[0]
            hint = names.suggestion(entry, norms)
            raise AdapterError(
                f'tune.targets: "{entry}" is the name of no module{hint or "."} '
                f"Norms are {listing(names.last_names(norms))}; a text is a regex over the whole name"
            )


def _saved(section: LayerNormSection, weights: Tree) -> set[str]:
    return saved_keys(section, Modules.of(weights), weights)


def _trained(section: LayerNormSection, weights: Tree) -> set[str]:
    return target_norms(section, weights) | _saved(section, weights)


def _entries(section: LayerNormSection, weights: Tree) -> list[Entry]:
    norms = target_norms(section, weights)
    found = [
        Entry(f"{PREFIX}{module_of(key)}.ln_tuning_layers.weight", weight.shape, path, _row(weight, row), None)
        for path, weight, row, key in _places(weights)
        if key in norms
    ]
    return found + whole_entries(Plan({}, frozenset(_saved(section, weights)), frozenset()), weights)


def _places(weights: Tree) -> list[tuple[Path, Weight, int, str]]:
    return [(path, weight, row, key) for path, weight in declared(weights) for row, key in enumerate(weight.keys)]


def _row(weight: Weight, row: int) -> int | None:
    return None if weight.layers is None else row


def _wrap(section: LayerNormSection, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None) -> Tree:
    return widened(params, weights, _trained(section, weights))


def all_biases(section: BitFitSection, weights: Tree) -> set[str]:
    """Keys of every bias."""
    biases = {key for key in all_keys(weights) if key.endswith(".bias")}
    if not biases:
        raise AdapterError(
            "tune.method bitfit trains the biases that a model has, and this one has none (tune.bias of method lora "
            "would find none either); take layernorm or lora"
        )
    return biases


def _wrap_biases(
    section: BitFitSection, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None
) -> Tree:
    return widened(params, weights, all_biases(section, weights))


# Source of the keys: peft 0.21, `LNTuningConfig`; of the tensors: files that it writes.
LAYERNORM_FILES = Files(
    "LN_TUNING",
    {"target_modules": "targets", "exclude_modules": "exclude", "modules_to_save": "modules_to_save"},
    {"exclude": None, "modules_to_save": []},
    write=lambda section, weights: {"modules_to_save": sorted(section.modules_to_save) or None},
    entries=_entries,
)
LAYERNORM = Method(LayerNormSection, trained=_trained, wrap=_wrap, separates=True, files=LAYERNORM_FILES)
BITFIT = Method(BitFitSection, trained=all_biases, wrap=_wrap_biases)
