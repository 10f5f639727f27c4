"""When memory runs out in a run: one message with what was needed, and what of this configuration can need less."""

import contextlib
from collections.abc import Iterator

import jax

from jaxtune.config import Config
from jaxtune.errors import OutOfMemory, is_out_of_memory


@contextlib.contextmanager
def explained(config: Config, doing: str, needs: str = "") -> Iterator[None]:
    """Turn a device's or the host's out-of-memory error into a message.

    doing: what this is around, as in "memory ran out {doing}". needs: what a step needs of each device, where that is
    known.

    Raises:
        OutOfMemory: in place of what XLA, the GPU's driver or Python raise for it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_message(error, config, doing, needs)) from error


def _message(error: BaseException, config: Config, doing: str, needs: str) -> str:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
    lines = [f"Out of memory {doing}: {first}"]
    lines += [needs + _limit()] if needs else []
    lines += ["What needs less, the cheapest first:", *(f"  {line}" for line in remedies(config))]
    lines += [
        "`jaxtune plan --search` tries them without weights or data. Checkpoints are as they were: the same command"
    ]
    return "\n".join(lines) + " goes on from the last one, and may change these"


def _limit() -> str:
    """What the fullest kind of device has, where the backend tells; a CPU does not."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    known = [limit for limit in limits if limit]
    return f"; a device has {min(known) / 1e9:.2f} GB" if known else ""


def remedies(config: Config) -> list[str]:
    """What this configuration can still change, without a change of what is learnt first. Never empty."""
    train, memory, data = config.train, config.memory, config.data
    rows = train.batch_size // train.micro_batches
    able = {
        f"train.micro_batches: {train.micro_batches * 2} (now {train.micro_batches}; the batch stays)": rows % 2 == 0,
        "memory.unroll: false": memory.unroll is True,
        "memory.remat: full (a layer's activations are computed again)": memory.remat != "full",
        "memory.offload: [optimizer] (its moments lie in the host's memory)": "optimizer" not in memory.offload,
        "memory.offload: [params, ...] (so do the weights)": "params" not in memory.offload,
        "precision.compute: bfloat16": config.precision.compute == "float32",
        "precision.params: bfloat16 (in a new run)": config.precision.params == "float32",
        "optim.name: adamw_8bit (in a new run)": config.optim.name in ("adam", "adamw"),
        "tune.method: lora (in a new run)": config.tune.method in ("full", "freeze"),
        "model.quantize: nf4 (in a new run)": config.model.quantize is None and config.tune.method == "lora",
        f"train.batch_size below {train.batch_size} (in a new run)": train.batch_size > 1,
        f"data.max_length below {data.max_length} (in a new run)": True,
        "more devices in mesh, with fsdp or tensor": True,
    }
    return [text for text, helps in able.items() if helps]
