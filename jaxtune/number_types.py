"""The types that a run computes in, and whether its devices have units for them."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import cpu_bfloat16
from jaxtune.config import Config, PrecisionSection


def compute_dtype(asked: str) -> Any:
    """`auto`: bfloat16, but on a CPU float32, whatever units it has: one configuration, one result on all of them."""
    if asked != "auto":
        return jnp.dtype(asked)
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def has_bfloat16(device: Any) -> bool:
    """Whether a device multiplies bfloat16 itself: before Ampere (8.0) XLA has an NVIDIA GPU do it in float32."""
    if device.platform == "cpu":
        return cpu_bfloat16.has_units() is not False
    return device.platform != "gpu" or re.match(r"[1-7]\.", str(device.compute_capability)) is None


def has_float8(device: Any) -> bool:
    """Whether a device multiplies float8 itself: the others compute in wider types, and slower than without it."""
    if device.platform == "tpu":
        return "v7" in device.device_kind.lower()
    if device.platform != "gpu":
        return False
    capability = str(device.compute_capability)  # NVIDIA's "8.9" is Ada's; AMD's "gfx942" is the MI300's
    return capability >= "gfx94" if capability.startswith("gfx") else float(capability) >= 8.9


def wider(precision: PrecisionSection, device: Any) -> Iterator[str]:
    """What is asked to be multiplied in a type that the device computes in a wider one."""
    if compute_dtype(precision.compute) == jnp.bfloat16 and not has_bfloat16(device):
        is_volta = device.platform == "gpu" and str(device.compute_capability).startswith("7.")  # has float16's since
        hint = "; precision.compute: float16 uses the units that it has, and scales the loss" if is_volta else ""
        yield (
            f"{_called(device)} has no bfloat16 units: its matmuls are computed in float32, which spares memory and "
            f"no time{hint}"
        )
    if precision.matmul == "float8" and not has_float8(device):
        yield f"{_called(device)} has no float8 units: its matmuls are computed in wider types, slower"


def narrower(config: Config, device: Any, is_quantized: bool) -> str | None:
    """What to try where a CPU has units for a type that is not computed in, and nobody has said which one to take.

    is_quantized: whether the linear maps of the model are.
    """
    is_asked = config.precision.compute != "auto" or config.precision.matmul == "float8"
    if is_asked or device.platform != "cpu" or not cpu_bfloat16.has_units():
        return None
    is_frozen = config.tune.method not in ("full", "freeze") and not is_quantized
    has_room = is_frozen and config.precision.params == "float32"
    frozen = ", and precision.params: bfloat16 holds the frozen weights in half the memory" if has_room else ""
    return f"This CPU multiplies bfloat16 itself: precision.compute: bfloat16 takes less time{frozen}"


def _called(device: Any) -> str:
    return "this CPU" if device.platform == "cpu" else device.device_kind
