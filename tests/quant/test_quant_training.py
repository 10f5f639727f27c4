"""QLoRA: LoRA over a quantised base, on one device and on eight."""

import functools

import numpy as np
import pytest

from jaxtune.quant.leaf import Quantized
from tests.quant.support import QuantStepper

STEPS = 3


@functools.cache
def losses(quantize, double, micro, **mesh):
    stepper = QuantStepper(quantize, double, mesh=dict(mesh), train={"micro_batches": micro, "batch_size": 16})
    return stepper, stepper.run(STEPS)


@pytest.mark.parametrize(
    ("micro", "mesh"),
    [(1, {"fsdp": 8}), (1, {"fsdp": 4, "tensor": 2}), (2, {"pipe": 2, "fsdp": 2, "tensor": 2})],
    ids=str,
)
def test_qlora_has_the_same_losses_on_eight_devices_as_on_one(micro, mesh):
    (_, alone), (stepper, spread) = losses("nf4", True, 1), losses("nf4", True, micro, **mesh)
    np.testing.assert_allclose(spread, alone, atol=2e-5)
    assert len(set(alone)) == STEPS
    leaf = stepper.frozen["stacks"][list(stepper.frozen["stacks"])[-1]]["mlp"]["up_proj"]["weight"]
    assert isinstance(leaf, Quantized)
    assert leaf.codes.addressable_shards[0].data.size * 8 == leaf.codes.size
