"""What is wrong with a configuration, in words for who wrote it: pydantic finds it, and its own text names Python's
types, branches of unions, and whole sections.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from jaxtune.elsewhere import ELSEWHERE, NOWHERE, VALUES
from jaxtune.errors import ConfigError, listing, nearest
from jaxtune.section import Section, TuneSection, describe, section_of
from jaxtune.yaml_text import parse_argument

Keys = tuple[str, ...]
BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


@dataclass
class Place:
    """A key of the configuration."""

    root: type[Section]  # the whole configuration
    method: str  # of tuning
    path: Keys
    owner: type[Section]  # the section that the key is in
    kind: Any  # what may stand there; None: there is no such key

    @classmethod
    def of(cls, loc: Iterable[str | int], root: type[Section], method: str) -> "Place":
        """Where pydantic's `loc` leads, as far as that goes: what follows in it are its own names."""
        place = cls(root, method, (), root, root)
        for part in loc:
            if not place._enter(part):
                break
            place.path = (*place.path, f"{part}")
        return place

    def _enter(self, part: str | int) -> bool:
        kind = self.kind
        if get_origin(kind) is dict:
            self.kind = get_args(kind)[1]
        elif section_of(kind) is None:
            return False
        elif get_origin(kind) is list:
            self.kind = section_of(kind)
        else:
            self.owner, field = kind, kind.model_fields.get(f"{part}")
            self.kind = None if field is None else field.annotation
            if self.kind is TuneSection:
                self.kind = _methods()[self.method].section
            elif field is not None and field.metadata:
                self.kind = Annotated[(field.annotation, *field.metadata)]
        return True

    @property
    def section(self) -> type[Section] | None:
        """The section that stands there, if one does."""
        return self.kind if section_of(self.kind) is self.kind else None

    def __str__(self) -> str:
        return ".".join(self.path)


def explain(
    wrong: Iterable[Any], root: type[Section], tree: dict, method: str, where: str, overrides: Iterable[str]
) -> Iterator[str]:
    """Pydantic's errors as lines `where: section.key: what is wrong; what is allowed`, one for each key.

    root: the class of the whole configuration. tree: what was given. method: of tuning. overrides: those of the
    command line, which are in the tree.
    """
    keys: dict[tuple, list[tuple[Place, Any]]] = {}
    for item in wrong:
        place = Place.of(item["loc"], root, method)
        told = item["msg"] if place.section else ""  # a section may have several
        keys.setdefault((place.path, told), []).append((place, item))
    for same in keys.values():
        place, item = same[0]
        path, concerned = place.path, Keys()
        if item["type"] == "extra_forbidden":
            concerned, text = ("tune", "method") if _owners(place) else Keys(), _unknown(place)
        elif place.section and item["type"] == "value_error":
            path, concerned, text = _of_keys(place, place.section, _message(item))
        else:
            text = f"{place}: {_of_a_value(place, [item for _, item in same], tree)}"
        yield f"{source_of(path, where, overrides, concerned)}: {text}"


def source_of(path: Keys, where: str, overrides: Iterable[str], concerned: Keys = ()) -> str:
    """Who is to blame for what is wrong at a key: the command line, or `where`.

    concerned: the section or the key that has a part in it; what the command line put there is named.
    """
    keys = {tuple(override.partition("=")[0].split(".")): override for override in overrides}
    if any(key[: len(path)] == path or path[: len(key)] == key for key in keys if path):
        return "command line"
    others = [f"{override:.80}" for key, override in keys.items() if concerned and key[: len(concerned)] == concerned]
    return f"{where} with {listing(others)}" if others else where


def shown(value: Any) -> str:
    """A value as it stands in YAML, near enough, and not too long."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else f"{value!r:.80}"


def _message(item: Any) -> str:
    text: str = item["msg"]
    return text.removeprefix("Value error, ")


def _of_keys(place: Place, section: type[Section], message: str) -> tuple[Keys, Keys, str]:
    """(the key at fault, if the message begins with one, the section, what to say) of keys that do not go together."""
    message = message.removeprefix(f"{place}.")
    first = message.split(" ")[0].split(".")[0].rstrip(":")
    if first in section.model_fields:
        return (*place.path, first), place.path, f"{place}.{message}"
    return (), place.path, f"{place}: {message}"


def _of_a_value(place: Place, items: list[Any], tree: Any) -> str:
    """What is wrong with the value of one key."""
    kind, item, found = place.kind, items[0], tree
    if item["type"] == "missing":
        return "missing; this key has no default"
    for part in item["loc"][: len(place.path)]:
        found = found[part]
    if kind is None or item["type"] == "value_error":
        return f"{_message(item)}; found {shown(found)}"
    if place.section:
        return f"expected a section, with keys such as {listing(place.section.model_fields, 3)}; found {shown(found)}"
    if len(items) == 1 and item["type"] in BOUNDS and item["input"] is found:
        return f"{_message(item).removeprefix('Input ')}; found {shown(found)}"
    expected = "allowed:" if kind is bool or get_origin(kind) is Literal else "expected"
    return f"{expected} {describe(kind)}; found {shown(found)}{_remedy(kind, found)}"


def _remedy(kind: Any, found: Any) -> str:
    """`; ` and what to write in place of a value of another type, or an empty string."""
    if isinstance(found, str):
        if _fits(kind, _read(found)):
            return "; that is text: take the quotes off"
        if _fits(kind, _read(found.lstrip("0"))):
            return f"; write {found.lstrip('0')}"
        names = [name.strip() for name in found.split(",")]
        if _fits(kind, names):
            return f"; write a list: [{', '.join(names)}]"
    elif isinstance(found, float) and found.is_integer() and _fits(kind, int(found)):
        return f"; write {int(found)}"
    elif isinstance(found, int | float) and _fits(kind, f"{found}"):
        return "; put it in quotes to make it text"
    choices = _choices(kind)
    unknown = [name for name in (found if isinstance(found, list) else [found]) if name not in choices]
    if not unknown:
        return ""
    ours = VALUES.get(f"{unknown[0]}")
    if ours is not None and ours.split()[0] in choices:
        return f"; write {ours}"
    return nearest(f"{unknown[0]}", [f"{choice}" for choice in choices])


def _read(text: str) -> Any:
    try:
        return parse_argument(text, "")
    except ConfigError:
        return None


def _fits(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind, config={"strict": True, "allow_inf_nan": False}).validate_python(value)
    except ValidationError:
        return False
    return value is not None


def _choices(kind: Any) -> list:
    """The words that may be chosen from, wherever they stand in a type."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for argument in get_args(kind) for choice in _choices(argument)]


def _unknown(place: Place) -> str:
    """Of a key that is not in its section."""
    key, allowed = place.path[-1], list(place.owner.model_fields)
    owners = _owners(place)
    if owners:
        return f"{place}: belongs to method {' or '.join(owners)} and would do nothing with {place.method}"
    ours, why = _told(ELSEWHERE, place), _told(NOWHERE, place)
    if why is not None:
        return f"{place}: unknown key; {why}"
    if ours is None:
        sections = [] if key == "name" else _sections(place)  # each section's names another thing
        here = [f"{name}.{key}" for name, kind in sections if key in kind.model_fields]
        hint = f'; did you mean "{listing(here)}"?' if here else nearest(key, allowed)
        return f"{place}: unknown key{hint or '.'} Allowed here: {listing(allowed, 40)}"
    section, option = re.findall(r"\w+", ours)[:2]
    owners = _methods_with(option) if section == "tune" else [place.method]
    if place.method in owners:
        return f"{place}: unknown key; jaxtune calls it {ours}"
    return (
        f"{place}: unknown key; jaxtune calls it {ours}, which belongs to method {' or '.join(owners)} and would do "
        f"nothing with {place.method}"
    )


def _told(table: dict[str, str], place: Place) -> str | None:
    """What a table of names from elsewhere says of a key, by its section and name or else by its name alone."""
    path = re.sub(r"^data\.sources\.\d+\.", "data.", f"{place}")  # a source has keys of data
    names = [name.lower().replace("-", "_") for name in (path, place.path[-1])]
    return next((table[name] for name in names if name in table), None)


def _owners(place: Place) -> list[str]:
    """The methods that have a key which the chosen one has not."""
    return _methods_with(place.path[-1]) if place.path[0] == "tune" else []


def _sections(place: Place) -> list[tuple[str, type[Section]]]:
    """The names of the other sections and what they hold."""
    found = {name: section_of(field.annotation) for name, field in place.root.model_fields.items()}
    found["tune"] = _methods()[place.method].section
    return [(name, kind) for name, kind in found.items() if kind is not None and kind is not place.owner]


def _methods() -> dict:
    from jaxtune.tune import METHODS

    return METHODS


def _methods_with(option: str) -> list[str]:
    return [name for name, method in _methods().items() if option in method.section.model_fields]
