"""Every row of docs/faults.md says what holds, and names tests that there are."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")
HEAD = "| fault | what holds | tests |\n|---|---|---|\n"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows() -> list[list[str]]:
    """The cells of each row of the tables."""
    tables = [part.split("\n\n")[0] for part in PAGE.split(HEAD)[1:]]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for table in tables for line in table.splitlines()]


def test_no_cell_is_blank_and_each_row_names_tests_and_nothing_else():
    assert len(rows()) >= 33 and PAGE.count("| fault |") == PAGE.count(HEAD)
    for row in rows():
        assert len(row) == 3 and all(row), row
        assert TEST.search(row[2]) and not TEST.sub("", row[2]).strip(", "), row[2]


def test_every_test_that_is_named_is_there():
    named = [test for row in rows() for test in TEST.findall(row[2])]
    there = {path: functions(REPOSITORY / path) for path, _ in named}
    assert [f"{path}::{name}" for path, name in named if name not in there[path]] == []


def functions(path: Path) -> set[str]:
    """The names of the functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
