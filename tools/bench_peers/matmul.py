"""The device, and the operations a second that it does in one large matmul: the best of several tries.

float32 and 2048 x 2048 on a CPU, bfloat16 and 8192 x 8192 on a GPU.
"""

import json
import time

import jax
import jax.numpy as jnp

TRIES, PRODUCTS = 6, 10


def main() -> None:
    device = {"platform": jax.default_backend(), "name": jax.devices()[0].device_kind}
    print(json.dumps(device | {"matmul_flops": matmul_rate()}))


def square() -> jax.Array:
    size, dtype = (2048, jnp.float32) if jax.default_backend() == "cpu" else (8192, jnp.bfloat16)
    return jax.random.normal(jax.random.key(0), (size, size), dtype)


def matmul_rate() -> float:
    """FLOP/s."""
    x = square()
    product = jax.jit(lambda x, y: x @ y / len(x) ** 0.5)
    return max(measure(product, product(x, x)) for _ in range(TRIES))


def measure(product, x: jax.Array) -> float:
    x.block_until_ready()
    started, y = time.perf_counter(), x
    for _ in range(PRODUCTS):
        y = product(x, y)
    y.block_until_ready()
    return PRODUCTS * 2 * x.shape[0] ** 3 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
