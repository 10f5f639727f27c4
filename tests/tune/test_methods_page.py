"""docs/methods.md has every method, under PEFT's name for it."""

import re

from jaxtune.tune import METHODS


def test_every_method_has_a_row_with_peft_s_name(repository):
    page = (repository / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = {}
    for line in page.partition("## ")[0].splitlines():
        if line.startswith("| `"):
            names, _, peft, _ = line.strip("|").split("|")
            rows |= dict.fromkeys(re.findall(r"`(\w+)`", names), peft.strip())
    assert rows.keys() == METHODS.keys()
    for name, method in METHODS.items():
        if method.files is None:
            assert not rows[name], name
        elif method.files.peft_type is not None:
            assert rows[name].startswith(f"`{method.files.peft_type}`"), name
