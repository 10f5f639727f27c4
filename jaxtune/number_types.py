"""The types that a run computes in, and whether its devices have units for them."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config import PrecisionSection


def compute_dtype(asked: str) -> Any:
    """`auto`: bfloat16 where the device gains from it; a CPU does not."""
    if asked != "auto":
        return jnp.dtype(asked)
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def has_bfloat16(device: Any) -> bool:
    """Whether a device multiplies bfloat16 itself: before Ampere (8.0) XLA has an NVIDIA GPU do it in float32."""
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
        has_float16 = str(device.compute_capability).startswith("7.")  # since Volta
        hint = "; precision.compute: float16 uses the units that it has, and scales the loss" if has_float16 else ""
        yield (
            f"{device.device_kind} has no bfloat16 units: its matmuls are computed in float32, which spares memory and "
            f"no time{hint}"
        )
    if precision.matmul == "float8" and not has_float8(device):
        yield f"{device.device_kind} has no float8 units: its matmuls are computed in wider types, slower"
