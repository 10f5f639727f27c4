"""How a method lies in PEFT's files: what each says of itself. Reading and writing are peft_config.py's, for the
settings, and peft_tensors.py's and peft_io.py's, for the tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from jaxtune.models.weights import Path, Tree
from jaxtune.tune.method import declared
from jaxtune.tune.names import module_of
from jaxtune.tune.plan import Plan

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, and the array in the tree whose numbers it has.

    row: along axis 0 of the array; None where it has no layers. part: of a typed leaf; None for a weight of its own.
    turned: the file has it transposed; otherwise the two may differ by dimensions of size 1.
    columns: what of the tensor's last dimension (turned: of its first) it is; None: all. The array may have several
    dimensions in place of that one. The file may have less than the array: its numbers are then the array's first
    ones along each dimension.
    """

    key: str
    shape: tuple[int, ...]
    path: Path
    row: int | None
    part: str | None
    turned: bool = False
    columns: tuple[int, int] | None = None


def no_entries(section: Any, weights: Tree) -> list[Entry]:
    return []


TENSORS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class Derived:
    """Of a method of which PEFT stores what is made of the weights that train, not those: these lie in a file of
    ours beside PEFT's, so that training can go on.

    file: the name of ours, which has the entries. tensors: (section, params) -> PEFT's, by name.
    """

    file: str
    tensors: Callable[[Any, Tree], dict[str, Any]]


@dataclass(frozen=True)
class Files:
    """A method in PEFT's files, or in those of another library.

    peft_type: as in adapter_config.json; None: the files are not PEFT's. tensors_name: of the file with them.
    settings: PEFT's key -> our option. defaults: what PEFT takes where a key is absent, in our names.
    nested: the key under which adapter_config.json has the settings; None: they are at its top.
    around: (settings, section, weights, name of the base model) -> the contents with them.
    fixed: keys and values that tell this method from others of its peft_type; written, and asked for.
    harmless: keys that change nothing, whatever their value.
    read: (contents of adapter_config.json, its path) -> options that take more than a new name; raises AdapterError
    for what we do not have. write: (section, weights) -> keys besides the settings.
    alias: name of a tensor -> of the one that it is a second copy of, if it is. entries: (section, weights) -> every
    other tensor of the file, no more and no less. fill: numbers of a part that no
    tensor has, where they are not 0: in layers without an adapter.
    stored: (section, weights, parameters) -> those that the files are written of, where they are another method's.
    derived: section -> what PEFT stores in place of the entries; None: them. reads: other peft_types that it can read,
    where no method of their own claims the directory. claims_file: a file that has to be there.
    """

    peft_type: str | None
    settings: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    read: Callable[[dict[str, Any], FilePath], dict[str, Any]] = lambda tree, where: {}
    write: Callable[[Any, Tree], dict[str, Any]] = lambda section, weights: {}
    entries: Callable[[Any, Tree], list[Entry]] = no_entries
    fill: dict[str, float] = field(default_factory=dict)
    stored: Callable[[Any, Tree, Tree], tuple[Any, Tree]] = lambda section, weights, params: (section, params)
    derived: Callable[[Any], Derived | None] = lambda section: None
    reads: frozenset[str] = frozenset()
    claims_file: str | None = None
    alias: Callable[[str], str] = lambda key: key
    tensors_name: str = TENSORS_NAME
    nested: str | None = None
    around: Callable[[dict[str, Any], Any, Tree, str | None], dict[str, Any]] = lambda settings, *rest: settings

    def with_entries(self, entries: Callable[[Any, Tree], list[Entry]]) -> "Files":
        return replace(self, entries=entries)

    def claims(self, tree: dict[str, Any], directory: FilePath) -> int:
        """How well an adapter_config.json, and its directory, fit this method; 0: it is another's."""
        if tree.get("peft_type") in self.reads:
            return 1
        if self.claims_file is not None and not (directory / self.claims_file).is_file():
            return 0
        inner = self.settings_in(tree)
        fits = tree.get("peft_type") == self.peft_type and all(inner.get(k) == v for k, v in self.fixed.items())
        return 2 + len(self.fixed) if fits else 0

    def settings_in(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The part of an adapter_config.json that has the settings."""
        inner = tree if self.nested is None else tree.get(self.nested)
        return inner if isinstance(inner, dict) else {}


# PEFT's keys of every method that sits on modules, and our options.
TARGET_SETTINGS = {
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "modules_to_save": "modules_to_save",
}
TARGET_DEFAULTS: dict[str, Any] = {"exclude": None, "layers": None, "modules_to_save": []}


def whole_entries(plan: Plan, weights: Tree) -> list[Entry]:
    """The tensors of the weights that train whole."""
    result = []
    for path, weight in declared(weights):
        for row, key in enumerate(weight.keys):
            if key in plan.trained:
                name = f"{module_of(key)}.base_layer.bias" if key in plan.biases else key
                result.append(Entry(PREFIX + name, weight.shape, path, None if weight.layers is None else row, None))
    return result
