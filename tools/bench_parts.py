#!/usr/bin/env python3
"""The parts of a training step, forward and backward, each beside the matmuls that it cannot do without.

usage: bench_parts.py [--parts head,attention,layers] [--dtype TYPE] [--rounds N] [--json FILE]

Qwen2.5-0.5B's shape; float32 on a CPU, bfloat16 elsewhere, or --dtype. A part and a large matmul take turns, and
every number is the median of the rounds, the ratios too: a shared machine's rate changes from one minute to the next.
Each is called once, untimed, right before it is timed.

head: logits, loss and gradient of so many supervised tokens; its matmuls are two, and are timed alone as well.
attention: of four layers in turn, as in a step, 2 products forward and 5 backward, of the tiles (128 x 128) of which
anything is seen.
layers: four of them but for attention, with the benchmark's LoRA and its dropout; 4 FLOPs for each weight and token.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from jaxtune import tune  # noqa: E402
from jaxtune.cpu_bfloat16 import compiler_options, contract  # noqa: E402
from jaxtune.huge_pages import start_anew  # noqa: E402
from jaxtune.leaves import combine, partition  # noqa: E402
from jaxtune.loss import cross_entropy  # noqa: E402
from jaxtune.models import decoder  # noqa: E402
from jaxtune.models.decoder import Model  # noqa: E402
from jaxtune.models.execution import Execution  # noqa: E402
from jaxtune.models.families import parse_config  # noqa: E402
from jaxtune.models.kernels import PLATFORMS, attend, keeps  # noqa: E402
from jaxtune.models.tiled import BLOCK  # noqa: E402
from jaxtune.models.weights import init_params, map_tree  # noqa: E402
from jaxtune.number_types import compute_dtype  # noqa: E402
from jaxtune.ops import Noise  # noqa: E402
from jaxtune.tune.lora import LoraSection  # noqa: E402
from tools.bench import LORA, SHAPE  # noqa: E402
from tools.bench_peers.matmul import product, square  # noqa: E402

CONFIG = parse_config(SHAPE | {"num_hidden_layers": 4})
KERNEL = PLATFORMS.get(jax.default_backend(), "xla")
PRODUCTS = 5 if jax.default_backend() == "cpu" else 50  # large matmuls of a turn
HEADS = (192, 256, 768)  # supervised tokens
# rows, tokens of a row, tokens of a document in the mean; None: the row is one document
ROWS = ((2, 384, 67), (1, 512, None), (1, 2048, 67), (1, 2048, None), (1, 4096, None))
LAYERS = ((2, 384), (1, 512), (1, 2048))  # rows, tokens of a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="head,attention,layers")
    parser.add_argument("--dtype", type=compute_dtype, default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {options.dtype}, jax {jax.__version__}\n")
    print(
        "| part | ms | its matmuls, TFLOP | a large matmul, TFLOP/s | share of that rate | matmuls alone, ms | times |"
    )
    print("|---|---|---|---|---|---|---|")
    found = []
    for part in options.parts.split(","):
        for name, flops, functions in PARTS[part](options.dtype):
            found.append(measured(name, flops, functions, options.rounds, options.dtype))
            print(row(found[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def measured(name: str, flops: float, functions: list[Callable[[], Any]], rounds: int, dtype: Any) -> dict[str, Any]:
    """functions: the part, and its matmuls alone where they are timed as well."""
    large = square(dtype)
    products = jax.jit(lambda x: jax.lax.fori_loop(0, PRODUCTS, lambda _, y: product(x, y), x))
    seconds = in_turns([partial(products, large), *functions], rounds)
    rates = [PRODUCTS * 2 * len(large) ** 3 / one[0] for one in seconds]
    return {
        "name": name,
        "seconds": median(one[1] for one in seconds),
        "flops": flops,
        "matmul_rate": median(rates),
        "share": median(flops / one[1] / rate for one, rate in zip(seconds, rates, strict=True)),
        "matmuls_alone": median(one[2] for one in seconds) if len(functions) > 1 else None,
        "times": median(one[1] / one[2] for one in seconds) if len(functions) > 1 else None,
    }


def in_turns(functions: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """[rounds][functions] seconds, all compiled before.

    Each is called once more right before it is timed, and finds the memory that it then gave back, as a step finds
    the last one's: some virtual machines take what has been free for two seconds, and to get 155 MB again cost half
    of a head's time.
    """

    def timed(function: Callable[[], Any]) -> float:
        jax.block_until_ready(function())
        started = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - started

    return [[timed(function) for function in functions] for _ in range(rounds)]


def row(found: dict[str, Any]) -> str:
    alone = found["matmuls_alone"]
    beside = ("", "") if alone is None else (f"{1e3 * alone:,.0f}", f"{found['times']:.2f}")
    cells = [found["name"], f"{1e3 * found['seconds']:,.0f}", f"{found['flops'] / 1e12:.3f}"]
    cells += [f"{found['matmul_rate'] / 1e12:.3f}", f"{found['share']:.0%}", *beside]
    return f"| {' | '.join(cells)} |"


def draw(seed: int, dtype: Any, *shape: int, scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def heads(dtype):
    weight = draw(0, dtype, CONFIG.vocab_size, CONFIG.hidden_size, scale=0.02)

    def loss(hidden, weight):
        targets = jnp.arange(hidden.shape[1])[None]
        return cross_entropy(hidden, weight, targets, jnp.ones(targets.shape))

    @jax.jit
    def alone(hidden, d, weight):
        return contract(hidden, weight, (1, 1)), contract(d, weight, (1, 0))

    part = jax.jit(jax.value_and_grad(loss))
    for tokens in HEADS:
        hidden, d = draw(1, dtype, 1, tokens, CONFIG.hidden_size), draw(2, dtype, tokens, CONFIG.vocab_size)
        functions = [partial(part, hidden, weight), partial(alone, hidden[0], d, weight)]
        yield f"head, {tokens} tokens", 4.0 * tokens * weight.size, functions


def attentions(dtype):
    def layer(given, _, segments):
        *qkv, d = given
        out, backward = jax.vjp(lambda *qkv: attend(KERNEL, *qkv, segments), *qkv)
        return tuple(x + 1e-6 * more for x, more in zip(given, (*backward(d), out), strict=True)), None

    @jax.jit
    def part(given, segments):
        return jax.lax.scan(partial(layer, segments=segments), given, length=CONFIG.num_layers)[0]

    count = (CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.num_kv_heads, CONFIG.num_heads)
    for rows, time_, mean in ROWS:
        segments = documents(rows, time_, mean)
        given = tuple(draw(n, dtype, rows, time_, heads, CONFIG.head_dim) for n, heads in enumerate(count))
        flops = CONFIG.num_layers * 7 * 2.0 * CONFIG.head_dim * CONFIG.num_heads * seen(segments)
        name = f"attention, {rows} x {time_}, " + ("one document" if mean is None else f"documents of {mean}")
        yield name, flops, [partial(part, given, segments)]


def documents(rows: int, time_: int, mean: int | None) -> jax.Array:
    """Segments [rows, time]."""
    if mean is None:
        return jnp.ones((rows, time_), jnp.int32)
    starts = np.random.default_rng(0).random((rows, time_)) < 1 / mean
    return jnp.asarray(np.cumsum(starts, axis=1) + 1, jnp.int32)


def seen(segments: jax.Array) -> int:
    """Pairs of a query and a key in the tiles of which anything is seen."""
    pairs = 0
    for own in np.asarray(segments):
        visible = np.tril(own[:, None] == own[None, :])
        cuts = np.arange(0, len(own), BLOCK)
        tiles = np.add.reduceat(np.add.reduceat(visible, cuts, axis=0, dtype=np.int64), cuts, axis=1) > 0
        sizes = np.diff(np.append(cuts, len(own)))
        pairs += int((tiles * np.outer(sizes, sizes)).sum())
    return pairs


def layers(dtype):
    model, trainable, frozen = adapted_model(dtype)
    linear = sum(leaf.size for leaf in jax.tree.leaves(frozen["stacks"]) if leaf.ndim == 3)

    def loss(trainable, frozen, tokens, noise, weights):
        places, segments = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), jnp.ones_like(tokens)
        hidden, _ = model.hidden(combine(trainable, frozen), tokens, places, segments, dtype, noise)
        return (hidden @ weights).sum()

    options = compiler_options(dtype, jax.devices()[0])
    part, weights = jax.jit(jax.grad(loss), compiler_options=options), draw(4, dtype, CONFIG.hidden_size)
    for rows, time_ in LAYERS:
        tokens = jnp.arange(rows * time_, dtype=jnp.int32).reshape(rows, time_)
        noise = Noise(jax.random.key(3), tokens)
        with patch.object(decoder, "attend", passed):
            run = partial(part, trainable, frozen, tokens, noise, weights)
            yield f"layers, {rows} x {time_}", 4.0 * linear * tokens.size, [run]


def adapted_model(dtype):
    """The benchmark's LoRA on random weights: a model, what trains and what does not."""
    section = tune.resolve(LoraSection(**LORA))
    execution = Execution(remat=keeps(KERNEL, Execution().remat), attention=KERNEL)
    model = Model.create(CONFIG, None, execution, tune.hooks(section, CONFIG))
    here = SingleDeviceSharding(jax.devices()[0])
    params = init_params(model.weights, map_tree(lambda _: here, model.weights), 0, CONFIG.init_std, dtype)
    params, mask = tune.apply(section, params, model.weights, 0)
    return model, *partition(params, mask)


def passed(kernel, q_BTHD, k_BTKD, v_BTKD, *_):
    """In attention's place: nothing to compute, of the same shape, with a gradient for all three."""
    groups = q_BTHD.shape[2] // k_BTKD.shape[2]
    return q_BTHD + jnp.repeat(k_BTKD + v_BTKD, groups, axis=2)


PARTS = {"head": heads, "attention": attentions, "layers": layers}

if __name__ == "__main__":
    start_anew()  # as the command line does
    main()
