"""bfloat16 on CPUs, some of which have units for it: what XLA has to be told before it uses them.

XLA of jax 0.10 multiplies in those units where a product of bfloat16 matrices is asked for in float32; where it is
asked for in bfloat16, it makes float32 matrices of them first. And of a stack of bfloat16 arrays that a loop goes
through it holds a second one in float32: it cuts out a layer in float32, and moves the rest of that conversion to
before the loop. jax 0.11 does neither, and is left alone. A single row is a vector to both, for which the whole matrix
is made float32; here it is given to them as two.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ABILITIES = Path("/proc/cpuinfo")
FLAGS = re.compile(r"^flags\b.*", re.MULTILINE)  # x86's; what XLA does with Arm's units was never tried
UNITS = re.compile(r"\b(avx512_bf16|amx_bf16)\b")
XLA_KNOWS = jax.__version_info__ >= (0, 11)
ROUNDED = "rounded"  # the checkpoint name of what was asked for in float32
HOISTING = "while-loop-invariant-code-motion"
_PLATFORM: ContextVar[str | None] = ContextVar("platform", default=None)


@cache
def has_units() -> bool | None:
    """Whether this CPU multiplies bfloat16 itself; None where the system does not tell, and on another than x86."""
    try:
        flags = FLAGS.search(ABILITIES.read_text())
    except OSError:
        return None
    return None if flags is None else UNITS.search(flags[0]) is not None


@contextmanager
def traced_for(device: Any) -> Iterator[None]:
    """What is traced inside is for such a device, whatever JAX's own are here."""
    token = _PLATFORM.set(device.platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def compiler_options(dtype: Any, device: Any) -> dict[str, str] | None:
    """Of jax.jit, for what computes in `dtype` on a device."""
    is_held_twice = device.platform == "cpu" and dtype == jnp.bfloat16 and not XLA_KNOWS
    return {"xla_disable_hlo_passes": HOISTING} if is_held_twice else None


def contract(a: jax.Array, b: jax.Array, dims: tuple[int, int]) -> jax.Array:
    """The product of a and b, of one type, in which it is, too. dims: of a and of b, what is summed over."""
    contracting = (((dims[0],), (dims[1],)), ((), ()))
    if not _is_ours(a.dtype):
        return jax.lax.dot_general(a, b, contracting)
    wide = jax.lax.dot_general(a, b, contracting, preferred_element_type=jnp.float32)
    return checkpoint_name(wide.astype(a.dtype), ROUNDED)


def dots(primitive: Any, *operands: Any, **settings: Any) -> bool:
    """jax.checkpoint's policy that keeps products, and of ours not the wide one."""
    is_wide = settings.get("preferred_element_type") == jnp.float32 and operands[0].dtype == jnp.bfloat16
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(ROUNDED)(primitive, *operands, **settings)
    return named or (not is_wide and policies.dots_with_no_batch_dims_saveable(primitive, *operands, **settings))


def matmul(x_TI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """x W^T: [T, I], [O, I] -> [T, O], of one type, with gradients."""
    if len(x_TI) == 1 and _uses_units(x_TI.dtype):
        return matmul(jnp.pad(x_TI, ((0, 1), (0, 0))), w_OI)[:1]
    return _matmul(x_TI, w_OI) if _is_ours(x_TI.dtype) else contract(x_TI, w_OI, (1, 1))


def _is_ours(dtype: Any) -> bool:
    """Whether XLA has to be asked for a product in float32."""
    return _uses_units(dtype) and not XLA_KNOWS


def _uses_units(dtype: Any) -> bool:
    on_cpu = (_PLATFORM.get() or jax.default_backend()) == "cpu"
    return dtype == jnp.bfloat16 and on_cpu and bool(has_units())


@jax.custom_vjp
def _matmul(x_TI, w_OI):
    """Its own backward pass, since autodiff would multiply the float32 gradient of a float32 product."""
    return contract(x_TI, w_OI, (1, 1))


def _matmul_fwd(x, w):
    """Residuals: x where w has a gradient, w where x has one."""
    return contract(x.value, w.value, (1, 1)), (x.value if w.perturbed else None, w.value if x.perturbed else None)


def _matmul_bwd(residuals, d_TO):
    x_TI, w_OI = residuals
    dx_TI = None if w_OI is None else contract(d_TO, w_OI, (1, 0))
    return dx_TI, None if x_TI is None else contract(d_TO, x_TI, (0, 0))


_matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)
