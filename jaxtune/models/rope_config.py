"""Rotary settings out of Hugging Face configs, old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`)."""

from typing import Any

from jaxtune.errors import listing
from jaxtune.models.config import Rope
from jaxtune.models.fields import Fields
from jaxtune.models.rope import KINDS

DEFAULT_THETA = 10000.0
COMMON = ("rope_theta", "rope_type", "type", "partial_rotary_factor", "finetuned")
KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}


def read_rope(fields: Fields) -> Rope:
    """The rotary settings of a config, with transformers' precedence; two that contradict are refused."""
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    outer = _Outer(fields)
    if not (old and new):
        return _parse(fields, "rope_scaling" if old else "rope_parameters", old or new or {}, outer)
    rope = _parse(fields, "rope_scaling", old, outer)
    if rope != _parse(fields, "rope_parameters", new, outer):
        fields.refuse("rope_scaling", "rope_parameters says otherwise; keep one of the two")
    return rope


class _Outer:
    """The rotary settings that stand beside the table."""

    def __init__(self, fields: Fields):
        fields.only("partial_rotary_factor", 1)
        self.max_positions = fields.whole("max_position_embeddings")
        self.theta = fields.number("rope_theta", 0.0) or None
        self.original = fields.whole("original_max_position_embeddings", 0, low=0) or None


def _parse(fields: Fields, name: str, values: dict[str, Any], outer: _Outer) -> Rope:
    table = Fields(values, f"{fields.source(name)}: {name}")
    kind = table.text("rope_type", table.text("type", "default"))
    if kind not in KINDS:
        table.refuse("rope_type" if "rope_type" in values else "type", f"supported: {listing(KINDS)}")
    table.only("type", kind)
    for key in values:
        if key not in COMMON + KEYS[kind] and values[key] is not None:
            table.refuse(key, f"{kind} has no such setting; allowed: {listing(KEYS[kind] + COMMON, 20)}")
    table.only("partial_rotary_factor", 1)
    theta = table.number("rope_theta", outer.theta or DEFAULT_THETA)
    if theta <= 1:
        table.refuse("rope_theta", "expected a number above 1")
    if outer.theta not in (None, theta):
        fields.refuse("rope_theta", f"{name} says {theta}; keep one of the two")
    return Rope(type=kind, theta=theta, **_READERS[kind](table, outer))


def _none(table: Fields, outer: _Outer) -> dict:
    return {}


def _factor(table: Fields, outer: _Outer) -> dict:
    factor = table.number("factor")
    if factor < 1:
        table.refuse("factor", "expected a number, at least 1")
    return {"factor": factor}


def _dynamic(table: Fields, outer: _Outer) -> dict:
    table.only("original_max_position_embeddings", outer.max_positions)
    return _factor(table, outer)


def _original(table: Fields, outer: _Outer) -> int:
    """The length before stretching. One beside the table wins over the table's, as in transformers."""
    inner = table.whole("original_max_position_embeddings", 0, low=0)
    return outer.original or inner or outer.max_positions


def _llama3(table: Fields, outer: _Outer) -> dict:
    low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
    if not 0 < low < high:
        table.refuse("high_freq_factor", f"expected more than low_freq_factor, {low}, and that above 0")
    return {
        **_factor(table, outer),
        "original_max_positions": _original(table, outer),
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def _yarn(table: Fields, outer: _Outer) -> dict:
    original = _original(table, outer)
    stretched = table.get("factor") is None
    optional = ("attention_factor", "mscale", "mscale_all_dim")
    return {
        **({"factor": outer.max_positions / original} if stretched else _factor(table, outer)),
        "original_max_positions": original,
        **{key: None if table.get(key) is None else table.number(key) for key in optional},
        "beta_fast": table.number("beta_fast", 0.0) or 32.0,
        "beta_slow": table.number("beta_slow", 0.0) or 1.0,
        "truncate": "truncate" not in table.values if table.get("truncate") is None else table.flag("truncate", True),
    }


_READERS = {"default": _none, "linear": _factor, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}


def write_rope(hf: dict[str, Any], rope: Rope) -> dict[str, Any]:
    """`hf` with the fields that give these rotary settings; untouched where it gives them already.

    New fields are written in the old form, which every version of transformers reads.
    """
    known = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
    given = any(name in hf for name in known)
    if given and read_rope(Fields(hf, "config.json")) == rope:
        return hf
    kept = {name: value for name, value in hf.items() if name not in known}
    return {**kept, "rope_theta": rope.theta, "rope_scaling": _scaling(rope)}


def _scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.type == "default":
        return None
    names = {"original_max_position_embeddings": "original_max_positions"}
    table = {key: getattr(rope, names.get(key, key)) for key in KEYS[rope.type]}
    return {"rope_type": rope.type, **{key: value for key, value in table.items() if value is not None}}
