"""`adapter_config.json` of PEFT, to a section and back. What of it is one method's stands with that method
(peft_files.py); the tensors beside it are peft_io.py's.

Source of the keys: peft 0.21, `PeftConfigMixin` and the configuration of each method.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from jaxtune.console import warn
from jaxtune.errors import AdapterError, ConfigError, listing
from jaxtune.files import expanded, inside, read_json
from jaxtune.hub import ADAPTER_CONFIG
from jaxtune.models.weights import Tree
from jaxtune.section import Targeted, TuneSection, adapter_of
from jaxtune.tune.names import Modules, last_names, module_of
from jaxtune.tune.plan import is_all_linear, make_plan

if TYPE_CHECKING:
    from jaxtune.tune.method import Method

CONFIG_NAME = ADAPTER_CONFIG
# Of no effect on what the adapter computes, whatever they hold.
HARMLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
READ_HERE = {"peft_type", "layers_pattern"}
OFF_AT_ZERO = {"module_dropout", "rank_dropout"}  # PEFT's, written by methods whose dropout here is another


def resolve(section: TuneSection) -> TuneSection:
    """The section with the settings of `section.adapter` in place of its own.

    Raises:
        ConfigError: a setting stands in the section and differs from the adapter's.
        AdapterError: the directory is not an adapter that we can use.
    """
    adapter = adapter_of(section)
    if adapter is None:
        return section
    found = read_config(Path(adapter))
    stored = ["method", *_files(found).settings.values()]
    differing = [
        f"tune.{name}: {getattr(section, name)!r}, the adapter has {getattr(found, name, None)!r}"
        for name in sorted(section.model_fields_set & set(stored))
        if _comparable(getattr(section, name)) != _comparable(getattr(found, name, None))
    ]
    if differing:
        raise ConfigError(
            f"tune.adapter {adapter}: its settings win, and these contradict them:\n"
            + "\n".join(differing)
            + "\nLeave them out."
        )
    # What PEFT does not store is the run's own.
    own = {name: getattr(section, name) for name in section.model_fields_set if name not in stored}
    return found.model_copy(update=own)


def is_resolved(section: TuneSection) -> bool:
    """Whether every setting stands in the section itself."""
    if adapter_of(section) is None:
        return True
    return set(_files(section).settings.values()) <= section.model_fields_set


def _methods() -> "dict[str, Method]":
    from jaxtune.tune import METHODS

    return METHODS


def _files(section: TuneSection) -> Any:
    return _methods()[section.method].files


def _comparable(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


def read_config(directory: Path) -> TuneSection:
    """The section that an adapter directory describes, with `adapter` set to the directory.

    Raises:
        AdapterError: no such file, or an option in it that we do not have; the message names each.
    """
    directory = expanded(directory)
    where = directory / CONFIG_NAME
    tree = _read_json(directory)
    name, method = _method_of(tree, where)
    files: Any = method.files
    options = files.read(tree, where)
    tree = files.settings_in(tree)
    _refuse_options(tree, where, files)
    if "target_modules" in files.settings and tree.get("target_modules") in (None, [], ""):
        raise AdapterError(f"{where}: target_modules is empty; it must list the modules that the adapter sits on")
    given = {ours: tree[theirs] for theirs, ours in files.settings.items() if tree.get(theirs) not in (None, [], "")}
    values = {**files.defaults, **given, **options, "method": name, "adapter": str(directory)}
    try:
        return method.section.model_validate({option: _ordered(value) for option, value in values.items()})
    except ValidationError as error:
        ours = {option: key for key, option in files.settings.items()}
        lines = [
            f"{ours.get(str(e['loc'][0]), e['loc'])}: {e['msg']}; found {e['input']!r:.80}" if e["loc"] else e["msg"]
            for e in error.errors()  # one without a place is of several settings together
        ]
        raise AdapterError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def warn_of_another_base(adapter: str | Path, model: str | Path) -> None:
    """Say where an adapter was made for a model of another name: shapes that fit do not tell. A model that lies in
    another place keeps its name, in the hub's cache too; a .gguf may say more behind it."""
    base = _read_json(expanded(adapter)).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return
    made_for, now = _name_of(base), _name_of(model)
    if now != made_for and not (now.endswith(".gguf") and now.startswith(made_for)):
        warn(f"{adapter}: made for {base}, and now on {model}; on weights that are not the same it is worth little")


def _name_of(model: str | Path) -> str:
    """Of a model, by where it lies or its hub id. In the hub's cache it is in models--OWNER--NAME/snapshots/COMMIT."""
    path = expanded(model).absolute()
    cached = path.parent.parent.name if path.parent.name == "snapshots" else ""
    return (cached.split("--")[-1] or path.name).casefold()


def method_of(directory: Path) -> str:
    """The name of the method whose adapter lies in a directory.

    Raises:
        AdapterError: no such file, or one of a method that we do not have.
    """
    directory = expanded(directory)
    return _method_of(_read_json(directory), directory / CONFIG_NAME)[0]


def _method_of(tree: dict[str, Any], where: Path) -> "tuple[str, Method]":
    """The method that an adapter_config.json is of: of several that it could be, the one that asks for most."""
    stored = {name: method for name, method in _methods().items() if method.files is not None}
    tree = {**tree, "peft_type": str(tree["peft_type"])} if tree.get("peft_type") is not None else tree
    claims = {name: method.files.claims(tree, where.parent) for name, method in stored.items() if method.files}
    name = max(claims, key=lambda name: claims[name])
    if not claims[name]:
        types = dict.fromkeys(method.files.peft_type or "" for method in stored.values() if method.files)
        raise AdapterError(
            f"{where}: peft_type {tree.get('peft_type')!r}; allowed are {', '.join(filter(None, types))}, and without "
            "a peft_type what the library adapters writes for DoubleSeqBnConfig, SeqBnConfig and ParBnConfig"
        )
    return name, stored[name]


def _ordered(value: Any) -> Any:
    """Lists that PEFT made from sets, in an order that does not change from one file to the next."""
    is_set = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return sorted(value) if is_set else value


def _read_json(directory: Path) -> dict[str, Any]:
    try:
        there = (directory / CONFIG_NAME).is_file()
    except OSError as problem:
        raise AdapterError(f"{directory}: cannot be read: {problem.strerror}") from None
    if not there:
        within = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_NAME}"))
        hint = f"; there is one in {listing(within)}: name that directory" if within else ""
        raise AdapterError(f"{directory}: not an adapter directory: no {CONFIG_NAME} in it{hint}")
    return read_json(inside(directory, CONFIG_NAME, AdapterError, str(directory)), AdapterError)


def _refuse_options(tree: dict, where: Path, files: Any) -> None:
    """An option that we do not have, and that is on, is named."""
    if tree.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        raise AdapterError(f"{where}: layers_pattern {tree['layers_pattern']!r}; allowed is 'layers'")
    known = files.settings.keys() | files.fixed.keys() | files.harmless | HARMLESS | READ_HERE
    on = [f"{key} = {value!r:.60}" for key, value in sorted(tree.items()) if key not in known and _is_on(key, value)]
    if on:
        raise AdapterError(f"{where}: options that jaxtune does not have: {'; '.join(on)}")


def _is_on(key: str, value: Any) -> bool:
    # False is told from 0 by what it is: of an option that we do not know, 0 may be the strongest setting.
    if value is None or value is False or value in ("", [], {}):
        return False
    return key not in OFF_AT_ZERO or value != 0


def to_peft(
    section: TuneSection, weights: Tree, base_model_name: str | None, revision: str | None = None
) -> dict[str, Any]:
    """The contents of `adapter_config.json` for a resolved section. revision: of a base model on the hub."""
    files = _files(section)
    tree = {
        **(_header(files.peft_type, base_model_name, revision) if files.peft_type else {}),
        **{theirs: _ordered(getattr(section, ours)) for theirs, ours in files.settings.items()},
        **files.write(section, weights),
        **files.fixed,
    }
    if isinstance(section, Targeted):
        tree["modules_to_save"] = _ordered(section.modules_to_save) or None
        unnamed = {"layers", "exclude"} - set(files.settings.values())  # which this method of PEFT's does not have
        if any(getattr(section, option) is not None for option in unnamed):
            tree["target_modules"] = sorted(module_of(key) for key in make_plan(section, weights).adapted)
        elif is_all_linear(section.targets):
            # A list, since PEFT refuses layers_to_transform beside a string.
            tree["target_modules"] = _ordered(last_names(Modules.of(weights).linears))
        if section.exclude is None:
            tree.pop("exclude_modules", None)  # younger than the others
    # The patterns inside keep their order: the first that matches decides.
    return files.around(dict(sorted(tree.items())), section, weights, base_model_name)


def _header(peft_type: str, base_model_name: str | None, revision: str | None) -> dict[str, Any]:
    """What every adapter_config.json of PEFT has."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "peft_type": peft_type,
        "revision": revision,
        "task_type": "CAUSAL_LM",
    }
