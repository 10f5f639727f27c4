"""Every mesh and option gives one device's losses and parameters: the table of docs/parallelism.md."""

import json

import numpy as np
import pytest

from tests.conftest import CACHE
from tests.parallel_rows import ROWS
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


@pytest.mark.parametrize("name", ROWS)
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
