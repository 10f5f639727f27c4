"""The device, and the operations a second that it does in one large matmul: the best of several tries.

usage: matmul.py [TYPE]

float32 and 2048 x 2048 on a CPU, bfloat16 and 8192 x 8192 on a GPU; of another type, where TYPE says one.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp

TRIES, PRODUCTS = 6, 10


def main() -> None:
    x = square(*sys.argv[1:])
    device = {"platform": jax.default_backend(), "name": jax.devices()[0].device_kind, "dtype": x.dtype.name}
    print(json.dumps(device | {"matmul_flops": matmul_rate(x)}))


def square(dtype: str = "") -> jax.Array:
    size, usual = (2048, "float32") if jax.default_backend() == "cpu" else (8192, "bfloat16")
    return jax.random.normal(jax.random.key(0), (size, size), dtype or usual)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y, as large as y in the mean, added up in float32."""
    return (jnp.matmul(x, y, preferred_element_type=jnp.float32) / len(x) ** 0.5).astype(x.dtype)


def matmul_rate(x: jax.Array) -> float:
    """FLOP/s."""
    compiled = jax.jit(product)
    return max(measure(compiled, compiled(x, x)) for _ in range(TRIES))


def measure(compiled, x: jax.Array) -> float:
    x.block_until_ready()
    started, y = time.perf_counter(), x
    for _ in range(PRODUCTS):
        y = compiled(x, y)
    y.block_until_ready()
    return PRODUCTS * 2 * x.shape[0] ** 3 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
