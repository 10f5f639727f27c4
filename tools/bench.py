#!/usr/bin/env python3
"""How many real tokens a second a configuration trains at on this machine. Writes no run directory.

usage: bench.py [--config FILE] [--seconds S] [section.key=value ...]

Runs the very step that training runs, on the configuration's own batches, after one step that is not timed. The
last line is JSON: tokens_per_second (padding not counted), positions_per_second (counted), steps, seconds, and
peak_memory_bytes of the process. Compare two things in turns, in the same minutes: a shared machine swings by a fifth.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(REPOSITORY / "configs" / "demo.yaml"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()

    from jaxtune.errors import UserError

    try:
        print(json.dumps(measure(arguments.config, arguments.overrides, arguments.seconds)))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def measure(path: str, overrides: list[str], seconds: float) -> dict:
    """Train for about `seconds`, and the figures of it."""
    import jax
    import jax.numpy as jnp

    from jaxtune.assemble import Source
    from jaxtune.config import load_config
    from jaxtune.data.loader import build_data
    from jaxtune.loop import prepare
    from jaxtune.mesh import make_mesh

    config = load_config(path, overrides)
    mesh = make_mesh(config.mesh)
    source = Source.open(config.model)
    data = build_data(config.data, config.eval, config.train, source.tokenizer)
    job = prepare(config, source, data, mesh)
    tokens = positions = steps = 0
    for step, batch in enumerate(data.train.batches(), 1):
        job.state, metrics = job.train_step(job.state, job.frozen, job.put(batch), jnp.int32(step))
        jax.block_until_ready(metrics)
        if step == 1:
            start = time.monotonic()
            continue
        tokens, positions, steps = tokens + batch.num_tokens, positions + batch.tokens.size, step - 1
        if time.monotonic() - start > seconds:
            break
    elapsed = time.monotonic() - start
    return {
        "tokens_per_second": round(tokens / elapsed, 1),
        "positions_per_second": round(positions / elapsed, 1),
        "steps": steps,
        "seconds": round(elapsed, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    }


if __name__ == "__main__":
    sys.exit(main())
