"""Every mesh and option gives one device's losses and parameters: the table of docs/parallelism.md."""

import json
import re

import numpy as np
import pytest

from tests.conftest import CACHE
from tests.parallel_rows import OFTEN, ROWS
from tests.programs import Stepper

STEPS = 5
LOSS_LIMIT, WEIGHT_LIMIT = 2e-5, 1e-4
# A larger epsilon than usual: Adam turns a gradient that is nothing but rounding (a key's bias has no other) into
# whole steps, and two correct programs round differently.
OPTIM = {"lr": 1e-3, "warmup": 0, "schedule": "constant"}
FOUND = CACHE / "parallel_table"
_expected: dict[str, tuple] = {}


def optim_of(sections):
    own = {**OPTIM, **sections.get("optim", {})}
    return own if own.get("name") == "adafactor" else {"eps": 1e-5, **own}


def after_steps(sections):
    stepper = Stepper(**{**sections, "optim": optim_of(sections)})
    return stepper.run(STEPS), stepper.weights()


def one_device(sections):
    """(losses, weights) of the same tuning method and optimiser on one device, in one micro-batch."""
    plain = {name: sections[name] for name in ("tune", "optim") if name in sections}
    key = json.dumps(plain, sort_keys=True)
    if key not in _expected:
        _expected[key] = after_steps(plain)
    return _expected[key]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.thorough) for name in ROWS]
)
def test_row(name):
    losses, weights = after_steps(ROWS[name])
    expected_losses, expected = one_device(ROWS[name])
    assert weights.keys() == expected.keys()
    loss = max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True))
    weight = max(float(np.abs(weights[key] - expected[key]).max()) for key in weights)
    FOUND.mkdir(parents=True, exist_ok=True)
    (FOUND / f"{name}.json").write_text(json.dumps({"loss": loss, "weights": weight}))
    assert loss <= LOSS_LIMIT
    assert weight <= WEIGHT_LIMIT


def test_the_docs_have_every_row_and_no_other(repository):
    text = (repository / "docs" / "parallelism.md").read_text(encoding="utf-8")
    table = text.split("<!-- table:")[1].split("<!-- end of the table -->")[0]
    found = re.findall(r"^\| ([^|]+) \| (\d\S*) \| (\d\S*) \|$", table, re.MULTILINE)
    assert [name for name, _, _ in found] == list(ROWS)
    assert len(table.strip().splitlines()) == 1 + 2 + len(ROWS)  # the marker, the head, the rows
    assert max(float(loss) for _, loss, _ in found) <= LOSS_LIMIT
    assert max(float(weight) for _, _, weight in found) <= WEIGHT_LIMIT
