"""YAML in its plain form: no aliases, no key twice, 1e-4 is a number, and numbers are decimal."""

import re
from typing import Any

import yaml

from jaxtune.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (their expansion has no bound) and without silent duplicate keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"line {mark.line + 1}: aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} is not a string")
            if key in seen:
                raise yaml.YAMLError(f'line {key_node.start_mark.line + 1}: key "{key}" stands twice')
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as a string, which everybody writes and means a number; and 010, 0x10 and 1:30 as 8, 16 and 90,
# which nobody here means: they are text, and refused where a number belongs.
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*)",
    "tag:yaml.org,2002:float": r"([-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what YAML 1.1 or the reader above would take for more than text."""


for _tag, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The YAML document in `text`; `where` names it in errors."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {_explain(error)}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        place = f"line {len(before)}, column {len(before[-1]) + 1}"
        raise ConfigError(f"{where}: not valid YAML: {place}: character {error.character!r} is not allowed") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def dump_yaml(value: Any) -> str:
    """What `parse_yaml` reads back to the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_argument(text: str, where: str) -> Any:
    """The YAML in one argument of a command line, in which a `#` begins no comment: what YAML would leave out or fold
    is text as it stands."""
    found, written = parse_yaml(text, where), text.strip()
    node = yaml.compose(text, Loader=_Loader)
    is_cut = bool(text[node.end_mark.index :].strip() if node else written)
    is_plain = isinstance(found, str) and not written.startswith(("'", '"', "|", ">", "&", "!"))
    return written if is_cut or is_plain else found


# How the parser's words begin -> ours, for what people do wrong most.
_PROBLEMS = {
    "mapping values are not allowed": 'a key where none can be: text with ": " in it needs quotes, and keys of one '
    "section have the same indentation",
    "expected <block end>": "this does not go on with what is above it: keys of one section, and items of one list, "
    "have the same indentation",
    "found character '\\t'": "a tab; indent with spaces",
    "found unexpected end of stream": "the text ends before the quotes do",
    "could not determine a constructor for the tag 'tag:yaml.org,2002:merge'": "<<, which merges one section into "
    "another, is not allowed: write its keys out",
    "could not determine a constructor": "a tag, which begins with !, is not allowed",
}
_OPENED = ("flow mapping", "flow sequence", "quoted scalar")  # what has an end of its own


def _explain(error: yaml.MarkedYAMLError) -> str:
    """Where it is, and what is wrong."""
    mark, problem = error.problem_mark or error.context_mark, error.problem or error.context or "cannot be read"
    ours = next((words for start, words in _PROBLEMS.items() if problem.startswith(start)), problem)
    ours = ours.replace("'<stream end>'", "the end")
    begun = error.context_mark if (error.context or "").endswith(_OPENED) else None
    opened = f"; what it belongs to begins at {_place(begun)}" if begun else ""
    return f"{_place(mark)}: {ours}{opened}" if mark else ours


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
