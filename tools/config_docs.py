#!/usr/bin/env python3
"""Write docs/config.md, the reference of every configuration key, from the fields and comments of jaxtune/config.py.

usage: config_docs.py [--check]

With --check it writes nothing, and exits with 1 when the page is not what it would write.
"""

import argparse
import ast
import inspect
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "config.md"
sys.path.insert(0, str(REPOSITORY))

from jaxtune import config as source  # noqa: E402 - the checkout's own, wherever this is run from
from jaxtune.section import describe, section_of  # noqa: E402
from jaxtune.tune import METHODS  # noqa: E402

INTRODUCTION = """\
# Configuration

One YAML file describes a run; `section.key=value` on the command line goes over it:

```
python -m jaxtune.train --config configs/demo.yaml train.epochs=2 optim.lr=5e-4
```

Only `model.path` and `data.path` (or `data.sources`, or `data.dataset`) have no default. A key that is not below is an
error, and so is a value of another type, or a key that the chosen method, format or optimiser would not use. An integer
is at most 2^31 - 1, and another number one that float32 holds. The file is plain YAML without aliases. The run
directory holds the configuration as it was resolved, in `config.yaml`.

This page is made from `jaxtune/config.py` and the methods in `jaxtune/tune/` by `python tools/config_docs.py`.

## What is refused

| what | why |
|---|---|
| a key of `tune` that belongs to another method | it would do nothing |
| `data.system`, `template`, `dialect`, `turn_end` or `train_on_prompt`, `train_on`, `train_roles` with format text or \
megatron; a column that the format does not read | likewise |
| `data.tags` with format alpaca, text or megatron | likewise |
| `data.train_on`, `train_roles` or `turn_end` with `train_on_prompt` | it learns every token |
| `data.sources` or `dataset` beside `path` or another key of a source's own; `sources` beside `system`, or beside \
`dataset` | each source has its own |
| a `weight` for some of `data.sources`, or for the only one; a `name` that two have | a weight is a share beside the \
others', a name tells them apart |
| `data.dataset_dir` without `dataset` | it would do nothing |
| `data.share_prefix` without `packing`, with `streaming`, or with a model whose attention has a window below \
`max_length` | only conversations of a pack share; a stream has not read them all; the start may lie outside of the \
window |
| `data.streaming` with format megatron; `shuffle_buffer` without it | files by memory map are no rows; \
it would do nothing |
| `data.split`, `subset` or `revision` of a local path | they are of a data set on the hub |
| `eval.split` without `eval.path` | likewise |
| `eval.every` without `eval.fraction` or `eval.path` | there is nothing to evaluate on |
| `data.too_long: split` with a format of conversations | later pieces would be answers without their question |
| `data.num_samples`, `on_bad_line`, `split`, `subset`, `revision` or `without` with format megatron | it has no rows |
| a key of `optim` that belongs to another optimiser or schedule | likewise |
| `optim.warmup` or `decay` of 1 or more that is no whole number; with wsd, more steps of both than the run has | they \
are a share below 1, or a number of steps |
| `model.double_quant` without `quantize: nf4` or `fp4` | their scales are what it quantises |
| `model.overrides` with `init: pretrained` | the weights fix the settings |
| `eval.path` and `eval.fraction` together | one evaluation has one source |

Of `mesh` and `memory`: [parallelism.md](parallelism.md#what-is-refused); of `precision`:
[precision.md](precision.md#what-is-refused).
"""


@dataclass
class Comments:
    """What the source says beside the fields of one class, by field name."""

    beside: dict[str, str]
    heading: dict[str, str]  # a comment on lines of its own starts a group at the field below it


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, field in source.Config.model_fields.items():
        parts.append(methods() if name == "tune" else section(name, field.annotation))
    return "\n".join(parts)


def methods() -> str:
    """The section `tune`: the options that several methods share, each once, then every method's own."""
    sections = {name: method.section for name, method in METHODS.items()}
    kinds = list(dict.fromkeys(kind for model in sections.values() for kind in reversed(model.__mro__) if _own(kind)))
    users = {kind: [name for name, model in sections.items() if issubclass(model, kind)] for kind in kinds}
    lines = ["## tune", "", inspect.getdoc(source.TuneSection) or "", "", "| key | value | default | |"]
    lines += ["|---|---|---|---|", f"| `method` | {', '.join(f'`{name}`' for name in sections)} | `lora` | |", ""]
    for kind in sorted(kinds, key=lambda kind: kind in sections.values()):
        named = ", ".join(f"`{name}`" for name in users[kind])
        title = f"### method: {users[kind][0]}" if kind in sections.values() else f"### Options of {named}"
        lines += [title, "", inspect.getdoc(kind) or "", ""]
        comments, fields = read_comments(kind), [key for key in _own(kind) if key != "method"]
        if fields:
            lines += ["| key | value | default | |", "|---|---|---|---|"]
        lines += [row(key, kind.model_fields[key], comments.beside.get(key, "")) for key in fields] + [""]
    return "\n".join(lines)


def _own(kind: type) -> list[str]:
    """The fields that a class of options declares itself."""
    if not issubclass(kind, source.TuneSection) or kind is source.TuneSection:
        return []
    return [name for name in kind.__annotations__ if name in kind.model_fields]


def section(name: str, model: type[source.Section], shown: dict[type, str] | None = None) -> str:
    """A heading, the docstring, a table for each group of fields, and then the sections inside this one.

    shown: the names under which sections inside others stand already; each kind stands once.
    """
    comments, shown = read_comments(model), {} if shown is None else shown
    lines = [f"## {name}", "", inspect.getdoc(model) or "", ""]
    inner = []
    for index, (key, field) in enumerate(model.model_fields.items()):
        if key in comments.heading:
            lines += ["", f"*{comments.heading[key]}*", ""]
        if index == 0 or key in comments.heading:
            lines += ["| key | value | default | |", "|---|---|---|---|"]
        kind = section_of(field.annotation)
        if kind is not None:
            if kind not in shown:
                shown[kind] = f"{name}.{key}"
                inner.append((shown[kind], kind))
            word, comment = "section" if kind is field.annotation else "list of sections", comments.beside.get(key, "")
            place = f"see [{shown[kind]}](#{shown[kind].replace('.', '')})"
            lines.append(f"| `{key}` | {word} | | {f'{comment}; ' if comment else ''}{place} |")
        else:
            lines.append(row(key, field, comments.beside.get(key, "")))
    lines += [""] + [section(*item, shown) for item in inner]
    return "\n".join(lines)


def row(key: str, field: Any, comment: str) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
    cells = [f"`{key}`", describe(field.annotation, field.metadata, "`"), default, comment]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def read_comments(model: type) -> Comments:
    """The comments in the source of a class and of those that it is made from, found with Python's own tokenizer."""
    found = Comments({}, {})
    for kind in reversed(model.__mro__):
        if issubclass(kind, source.Section) and kind is not source.Section:
            own = _comments_of(kind)
            found.beside |= own.beside
            found.heading |= own.heading
    return found


def _comments_of(model: type) -> Comments:
    text = inspect.getsource(model)
    fields = {node.lineno: node.target.id for node in ast.parse(text).body[0].body if isinstance(node, ast.AnnAssign)}
    result, waiting = Comments({}, {}), []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        number, comment = token.start[0], token.string.lstrip("# ")
        if token.type == tokenize.COMMENT and number in fields:
            result.beside[fields[number]] = comment
        elif token.type == tokenize.COMMENT:
            waiting.append(comment)
        elif waiting and number in fields:
            result.heading[fields[number]], waiting = " ".join(waiting), []
    return result


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value) if value != "" else '""'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return 0 if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page() else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
