"""docs/config.md says what jaxtune/config.py does."""

import subprocess
import sys
from typing import Annotated, Literal

from pydantic import Field

from jaxtune.config import Config, OptimSection, Section
from jaxtune.section import describe
from jaxtune.tune import METHODS
from tools import config_docs as tool


class Grouped(Section):
    first: int = 0
    # a group
    second: int = 0


def test_the_page_is_up_to_date(repository):
    text = (repository / "docs" / "config.md").read_text(encoding="utf-8")
    assert text == tool.page(), "run python tools/config_docs.py"


def test_every_key_of_every_section_has_a_row():
    text = tool.page()
    for name, field in Config.model_fields.items():
        body = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        sections = [method.section for method in METHODS.values()] if name == "tune" else [field.annotation]
        for key in (key for section in sections for key in section.model_fields):
            assert f"\n| `{key}` | " in body, f"{name}.{key}"


def test_a_row_has_type_bounds_default_and_the_comment():
    fields, comments = OptimSection.model_fields, tool.read_comments(OptimSection)
    assert comments.beside["clip_norm"] == "null: no clipping"
    clip = tool.row("clip_norm", fields["clip_norm"], comments.beside["clip_norm"])
    assert clip == "| `clip_norm` | number > 0 or null | `1.0` | null: no clipping |"


def test_comments_on_lines_of_their_own_head_a_group():
    heading = tool.read_comments(Grouped).heading
    assert heading == {"second": "a group"}


def test_types_are_told_in_words():
    assert describe(list[str] | str | None) == "list of text or text or null"
    assert describe(dict[str, Annotated[int, Field(gt=0)]]) == "map to integer > 0"
    assert describe(Literal["a", "b"], mark="`") == "`a`, `b`"


def test_a_bar_in_a_cell_does_not_end_the_cell():
    class Odd(Section):
        either: str = "a|b"

    assert tool.row("either", Odd.model_fields["either"], "x | y") == r"| `either` | text | `a\|b` | x \| y |"


def test_check_tells_whether_the_page_would_change(repository):
    command = [sys.executable, str(repository / "tools" / "config_docs.py"), "--check"]
    assert subprocess.run(command).returncode == 0
