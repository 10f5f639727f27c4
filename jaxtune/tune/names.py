"""Names of modules as PEFT sees a Hugging Face model, and PEFT's rules for matching them. No arrays here.

Source of the rules: peft 0.21, `tuners_utils.check_target_module_exists`, `other.get_pattern_key`,
`other._set_trainable`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from jaxtune.errors import AdapterError, nearest
from jaxtune.models.weights import Tree
from jaxtune.tune.method import declared

T = TypeVar("T")
ALL_LINEAR = "all-linear"
# What PEFT makes of an entry of modules_to_save, and of a key of rank_pattern or alpha_pattern.
SAVED, PATTERN = r"(^|.*\.){}($|\..*)", r"(.*\.)?({})$"
LAYER_NUMBER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")


@dataclass(frozen=True)
class Modules:
    """Full names, such as model.layers.0.self_attn.q_proj, by what the module is."""

    linears: tuple[str, ...]  # without the head
    embedding: str
    head: str | None  # None: tied
    others: tuple[str, ...]  # norms, and modules that hold modules

    @property
    def adaptable(self) -> list[str]:
        """Those that a LoRA can sit on."""
        return [self.embedding, *self.linears, *([self.head] if self.head else [])]

    @property
    def all(self) -> list[str]:
        return [*self.adaptable, *self.others]

    @classmethod
    def of(cls, weights: Tree) -> "Modules":
        linears: list[str] = []
        others: list[str] = []
        embedding, head = "", None
        for path, weight in declared(weights):
            names = [module_of(key) for key in weight.keys]
            if path[-1] != "weight":
                continue
            if path[0] == "embed":
                embedding = names[0]
            elif path[0] == "head":
                head = names[0]
            else:
                (linears if len(weight.shape) == 2 else others).extend(names)
        holders = dict.fromkeys(holder for name in [embedding, *linears, *others] for holder in _holders(name))
        return cls(tuple(linears), embedding, head, (*others, *holders))


def module_of(key: str) -> str:
    """model.norm.weight -> model.norm"""
    return key.rpartition(".")[0]


def _holders(name: str) -> list[str]:
    """Every module around the named one, the model itself left out."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def last_names(names: Iterable[str]) -> list[str]:
    """The distinct last parts of full names, in order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def suggestion(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?` for a name or regex that matched none of `names`: near to its first unknown part."""
    names = list(names)
    parts = list(dict.fromkeys(part for name in names for part in name.split(".")))
    for piece in re.split(r"[^\w-]+", name):
        if piece and piece not in parts and (hint := nearest(piece, parts)):
            return hint
    return nearest(name, names)


def compiled(pattern: str, where: str, form: str = "{}") -> re.Pattern:
    """The regex, as `form` has it, or an error that says where it stands."""
    try:
        whole = re.compile(pattern)
    except re.error as error:
        raise AdapterError(f'{where}: "{pattern}" is not a regular expression: {error}') from None
    try:
        return whole if form == "{}" else re.compile(form.format(pattern))
    except re.error as error:
        raise AdapterError(
            f'{where}: "{pattern}" stands within a longer regular expression: {error}; '
            "write a flag such as (?i)name as (?i:name)"
        ) from None


def is_named(name: str, listed: list[str] | str) -> bool:
    """PEFT's rule for targets and exclusions: a string is a regex over the whole name, a list has names or ends."""
    if isinstance(listed, str):
        return re.fullmatch(listed, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in listed)


def is_saved(name: str, modules_to_save: Iterable[str]) -> bool:
    """PEFT's rule for modules_to_save: any end of the name, so that `norm` is also `input_layernorm`."""
    return any(name.endswith(entry) for entry in modules_to_save)


def is_feedforward(name: str, listed: list[str] | str) -> bool:
    """PEFT's rule for the modules of which IA3 scales the input: here a list has ends, whatever stands before."""
    if isinstance(listed, str):
        return re.fullmatch(listed, name) is not None
    return name.endswith(tuple(listed))


def in_saved(name: str, modules_to_save: Iterable[str]) -> bool:
    """PEFT's rule for what a target never touches: a module of modules_to_save, or one inside it."""
    return any(re.match(SAVED.format(entry), name) for entry in modules_to_save)


def in_layers(name: str, listed: list[str] | str, layers: list[int] | int | None) -> bool:
    """PEFT's layers_to_transform: the first number in the name; a full name in the list needs no layer."""
    if layers is None or isinstance(listed, str) or name in listed:
        return True
    found = LAYER_NUMBER.match(name)
    wanted = [layers] if isinstance(layers, int) else layers
    return found is not None and int(found["layer"]) in wanted


def pattern_of(name: str, patterns: Iterable[str]) -> str | None:
    """The first of rank_pattern's or alpha_pattern's keys that is a regex for the end of the name."""
    return next((pattern for pattern in patterns if re.match(PATTERN.format(pattern), name)), None)


def by_pattern(name: str, patterns: dict[str, T], default: T) -> T:
    """The value that the patterns give to a module."""
    pattern = pattern_of(name, patterns)
    return default if pattern is None else patterns[pattern]
