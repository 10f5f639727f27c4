"""`adapter_config.json` of PEFT, to a TuneSection and back. The tensors beside it are peft_io.py's.

Source of the keys: peft 0.21, `LoraConfig` and `PeftConfigMixin`. Written are the keys that PEFT had in 2023,
since a PEFT older than 0.19 fails on a key that it does not know.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxtune.config import TuneSection
from jaxtune.errors import AdapterError, ConfigError, listing
from jaxtune.files import inside, read_json
from jaxtune.models.weights import Tree
from jaxtune.tune.names import Modules, last_names
from jaxtune.tune.plan import is_all_linear

CONFIG_NAME = "adapter_config.json"

# PEFT's key -> ours
SETTINGS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "use_rslora": "use_rslora",
    "bias": "bias",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "layers_to_transform": "layers",
    "modules_to_save": "modules_to_save",
}
DEFAULTS: dict[str, Any] = {  # PEFT's, in our names
    "rank": 8,
    "alpha": 8,
    "dropout": 0.0,
    "exclude": None,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers": None,
    "modules_to_save": [],
}
# Of no effect on what the adapter computes, whatever they hold.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
READ_HERE = {"peft_type", "init_lora_weights", "layers_pattern"}
# Starts that leave the base weights as they are. Most others (pissa, olora, corda, ...) subtract the start from
# them, so that the adapter belongs to a base that is not the model's; mica keeps B fixed in training.
HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def resolve(section: TuneSection) -> TuneSection:
    """The section with the settings of `section.adapter` in place of its own.

    Raises:
        ConfigError: a setting stands in the section and differs from the adapter's.
        AdapterError: the directory is not an adapter that we can use.
    """
    if section.adapter is None:
        return section
    found = read_config(Path(section.adapter))
    differing = [
        f"tune.{name}: {getattr(section, name)!r}, the adapter has {getattr(found, name)!r}"
        for name in sorted(section.model_fields_set & set(SETTINGS.values()))
        if _comparable(getattr(section, name)) != _comparable(getattr(found, name))
    ]
    if differing:
        raise ConfigError(
            f"tune.adapter {section.adapter}: its settings win, and these contradict them:\n"
            + "\n".join(differing)
            + "\nLeave them out."
        )
    return found


def is_resolved(section: TuneSection) -> bool:
    """Whether every setting stands in the section itself."""
    return section.adapter is None or set(SETTINGS.values()) <= section.model_fields_set


def _comparable(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


def read_config(directory: Path) -> TuneSection:
    """The section that an adapter directory describes, with `adapter` set to the directory.

    Raises:
        AdapterError: no such file, or an option in it that we do not have; the message names each.
    """
    where = directory / CONFIG_NAME
    tree = _read_json(directory)
    if tree.get("peft_type") != "LORA":
        raise AdapterError(f"{where}: peft_type {tree.get('peft_type')!r}; allowed is 'LORA'")
    _refuse_options(tree, where)
    if tree.get("target_modules") in (None, [], ""):
        raise AdapterError(f"{where}: target_modules is empty; it must list the modules that the adapter sits on")
    given = {ours: tree[theirs] for theirs, ours in SETTINGS.items() if tree.get(theirs) not in (None, [], "")}
    init = "gaussian" if tree.get("init_lora_weights") == "gaussian" else "default"
    values = {**DEFAULTS, **given, "method": "lora", "init": init, "adapter": str(directory)}
    try:
        return TuneSection.model_validate({name: _ordered(value) for name, value in values.items()})
    except ValidationError as error:
        ours = {name: key for key, name in SETTINGS.items()}
        lines = [
            f"{ours.get(str(e['loc'][0]), e['loc'])}: {e['msg']}; found {e['input']!r:.80}" for e in error.errors()
        ]
        raise AdapterError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def _ordered(value: Any) -> Any:
    """Lists that PEFT made from sets, in an order that does not change from one file to the next."""
    return sorted(value, key=str) if isinstance(value, list) else value


def _read_json(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG_NAME).is_file():
        within = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_NAME}"))
        hint = f"; there is one in {listing(within)}: name that directory" if within else ""
        raise AdapterError(f"{directory}: not an adapter directory: no {CONFIG_NAME} in it{hint}")
    return read_json(inside(directory, CONFIG_NAME, AdapterError, str(directory)), AdapterError)


def _refuse_options(tree: dict, where: Path) -> None:
    """An option that we do not have, and that is on, is named."""
    init = tree.get("init_lora_weights")
    if not any(init is allowed or init == allowed for allowed in HARMLESS_INITS):
        raise AdapterError(
            f"{where}: init_lora_weights {init!r} changes the base weights or how the adapter trains; allowed are "
            "true, false, 'gaussian', 'eva' and 'orthogonal'. PEFT's save_pretrained converts such an adapter "
            "when it is given path_initial_model_for_weight_conversion"
        )
    if tree.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        raise AdapterError(f"{where}: layers_pattern {tree['layers_pattern']!r}; allowed is 'layers'")
    known = SETTINGS.keys() | HARMLESS | READ_HERE
    on = [f"{key} = {value!r:.60}" for key, value in sorted(tree.items()) if key not in known and _is_on(value)]
    if on:
        raise AdapterError(f"{where}: options that jaxtune does not have: {'; '.join(on)}")


def _is_on(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def to_peft(section: TuneSection, weights: Tree, base_model_name: str | None) -> dict[str, Any]:
    """The contents of `adapter_config.json` for a resolved section."""
    targets: Any = section.targets
    if is_all_linear(section.targets):
        # A list, since PEFT refuses layers_to_transform beside a string.
        targets = last_names(Modules.of(weights).linears)
    alpha = {name: _whole(value) for name, value in section.alpha_pattern.items()}
    tree = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if section.init == "gaussian" else True,
        "layers_pattern": None,
        "peft_type": "LORA",
        "revision": None,
        "task_type": "CAUSAL_LM",
        **{theirs: _ordered(getattr(section, ours)) for theirs, ours in SETTINGS.items()},
        "target_modules": _ordered(targets),
        "modules_to_save": _ordered(section.modules_to_save) or None,
        "lora_alpha": _whole(section.alpha),
        "alpha_pattern": alpha,
    }
    if section.exclude is None:
        del tree["exclude_modules"]  # younger than the others
    return dict(sorted(tree.items()))  # the patterns inside keep their order: the first that matches decides


def _whole(number: float) -> int | float:
    """PEFT declares alpha as an integer."""
    return int(number) if number == int(number) else number
