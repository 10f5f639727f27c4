"""The table of docs/methods.md: every method over every base, on 1 and on 8 devices, without a blank cell."""

import json
import math
import subprocess
import sys

import pytest

from jaxtune.tune import METHODS
from tools import methods_table as tool

# The largest difference of the losses on 1 and on 8 devices, which add up in another order; and of P-tuning's, whose
# encoder makes differences of 1e-6 grow a thousandfold in 30 steps.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "int8": 1e-2, "nf4": 1e-2, "gptq": 1e-2}
SENSITIVE = {"p_tuning": 0.2}
QUANTIZED = {"int8", "nf4", "gptq"}
REFUSED = {
    *(("full", base) for base in QUANTIZED),  # a quantised weight cannot train
    *(("loftq", base) for base in ("float32", "bfloat16", "gptq")),  # nothing is quantised as it is loaded
    *(("pissa", base) for base in QUANTIZED),  # it takes singular values away from the weights
}
MEASURED = {"lora-nf4-8": 0.01}  # cell: how far the page may be from it


@pytest.fixture(scope="module")
def page():
    """(name of a row, base) -> the losses of its cell, or a word."""
    text = tool.PAGE.read_text(encoding="utf-8").split(tool.BEGIN)[1].split(tool.END)[0]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, _, *rows = rows
    assert all(len(row) == len(head) for row in rows)
    return {(row[0].strip("`"), base): read(cell) for row in rows for base, cell in zip(head[1:], row[1:], strict=True)}


def read(cell: str) -> tuple[float, ...] | str:
    return cell if cell == "refused" else tuple(map(float, cell.split(" / ")))


def test_the_table_has_every_method_and_base_and_no_blank_cell(page):
    assert set(page) == {(name, base) for name in ("before", *METHODS) for base in tool.BASES}
    assert set(tool.METHODS) == set(METHODS)


def test_only_what_cannot_be_is_refused(page):
    assert {cell for cell, found in page.items() if found == "refused"} == REFUSED


def test_every_loss_has_fallen_alike_on_1_and_on_8_devices(page):
    for (method, base), found in page.items():
        if found != "refused":
            one, eight = found
            assert all(map(math.isfinite, found)), (method, base)
            assert abs(one - eight) <= SENSITIVE.get(method, TOLERANCE[base]), (method, base)
            assert method == "before" or max(found) < min(page["before", base]) - 0.1, (method, base)


@pytest.mark.real
@pytest.mark.thorough
def test_the_page_has_what_is_measured_now(page, smollm2, tmp_path):
    command = [sys.executable, tool.__file__, "--cells", ",".join(MEASURED), "--home", str(tmp_path)]
    subprocess.run(command, check=True, timeout=900)
    for name, limit in MEASURED.items():
        method, base, devices = name.split("-")
        losses = json.loads((tmp_path / f"{name}.json").read_text())["losses"]
        assert abs(losses[tool.STEPS] - page[method, base][int(devices) == 8]) <= limit, name
