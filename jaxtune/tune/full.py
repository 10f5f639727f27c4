"""Methods that add nothing: everything trains, or everything but what is frozen by name."""

from collections.abc import Iterable
from typing import Literal

from jaxtune.errors import AdapterError
from jaxtune.models.weights import Tree
from jaxtune.section import NonNegative, TuneSection
from jaxtune.tune.method import EMBEDDING, Method, all_keys, declared, get_path
from jaxtune.tune.names import compiled, suggestion


class FullSection(TuneSection):
    """Every weight trains."""

    method: Literal["full"] = "full"


class FreezeSection(TuneSection):
    """Everything trains but what is named."""

    method: Literal["freeze"] = "freeze"
    freeze_embedding: bool = False
    freeze_first: NonNegative = 0  # layers
    freeze_last: NonNegative = 0  # layers
    freeze_patterns: list[str] = []  # regexes over Hugging Face weight names, found anywhere in them
    train_patterns: list[str] = []  # likewise; when given, nothing else trains


def train_all(section: FullSection, weights: Tree) -> set[str]:
    return set(all_keys(weights))


def train_unfrozen(section: FreezeSection, weights: Tree) -> set[str]:
    """The keys that `train_patterns` finds (without it, all), less those that the freeze_* settings name."""
    keys = all_keys(weights)
    allowed = _found("train_patterns", section.train_patterns, keys) if section.train_patterns else set(keys)
    frozen: set[str] = set()
    for option, named in _freezes(section, weights):
        if not named & allowed:
            raise AdapterError(f"tune.{option}: nothing that it names would train anyway; remove it")
        frozen |= named
    if not frozen and not section.train_patterns:
        raise AdapterError("tune.method freeze: nothing is frozen; set a freeze_* key, or take method: full")
    if not allowed - frozen:
        raise AdapterError("tune.method freeze: every weight is frozen, nothing is left to train")
    return allowed - frozen


def _freezes(section: FreezeSection, weights: Tree) -> Iterable[tuple[str, set[str]]]:
    """(setting, the keys that it freezes) for every setting that is on."""
    if section.freeze_embedding:
        yield "freeze_embedding", set(get_path(weights, EMBEDDING).keys)
    number = _number_of_layers(weights)
    for option, count in (("freeze_first", section.freeze_first), ("freeze_last", section.freeze_last)):
        if count > number:
            raise AdapterError(f"tune.{option}: {count} layers; the model has {number}")
        if count:
            yield option, _keys_of(weights, range(count) if option == "freeze_first" else range(number - count, number))
    if section.freeze_patterns:
        yield "freeze_patterns", _found("freeze_patterns", section.freeze_patterns, all_keys(weights))


def _number_of_layers(weights: Tree) -> int:
    return max(weight.layers.stop for _, weight in declared(weights) if weight.layers is not None)


def _keys_of(weights: Tree, layers: range) -> set[str]:
    """The keys of every weight of these layers."""
    pairs = [(weight, layer) for _, weight in declared(weights) for layer in weight.layers or ()]
    return {weight.key.format(layer=layer) for weight, layer in pairs if layer in layers}


def _found(option: str, patterns: list[str], keys: list[str]) -> set[str]:
    """The keys in which one of the regexes is found; one that is found in none is an error."""
    found: set[str] = set()
    for pattern in patterns:
        regex = compiled(pattern, f"tune.{option}")
        matched = {key for key in keys if regex.search(key)}
        if not matched:
            hint = suggestion(pattern, keys)
            raise AdapterError(
                f'tune.{option}: "{pattern}" is found in no weight name{hint or "."} '
                f"Names are like {keys[0]}, {keys[-1]}; a tied head has no name of its own"
            )
        found |= matched
    return found


FULL = Method(FullSection, trained=train_all)
FREEZE = Method(FreezeSection, trained=train_unfrozen)
