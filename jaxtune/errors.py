"""Every error that a user can cause. The command line prints the message alone and exits with code 2.

A message says where, what was found, what is allowed, and what to do.
"""

import os
import traceback
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """The user's input is wrong; nothing of theirs has been changed."""

    exit_code = 2


class ConfigError(UserError):
    """The YAML file or a command-line override."""


class DataError(UserError):
    """A data file, its columns, its template, or its lengths."""


class ModelError(UserError):
    """A model directory or hub id: its settings, weights or tokenizer."""


class AdapterError(UserError):
    """A PEFT adapter directory, or a tuning method that does not fit the model."""


class MeshError(UserError):
    """A mesh that does not fit the devices, the model or the batch."""


class CheckpointError(UserError):
    """A run directory or a checkpoint in it."""


class ProcessError(UserError):
    """Several processes that do not make one run: their number, their addresses, or what each of them was given."""


class LostProcess(ProcessError):
    """Another process of the run is gone, so this one cannot go on either."""

    exit_code = 75  # sysexits.h: a temporary failure; the same command again goes on with the run

    def __init__(self, message: str, process: int):
        super().__init__(message)
        self.process = process


class SaveError(CheckpointError):
    """A checkpoint or a result could not be written: no fault in what the user asked for, but the run cannot go on."""

    exit_code = 1


class OutputError(UserError):
    """Where the words go cannot be written to: stdout is a file on a full disk, say."""

    exit_code = 1


class TrainingStopped(UserError):
    """Training has come to nothing, though no input was found to be wrong."""

    exit_code = 1


class OutOfMemory(UserError):
    """A device or the host has not the memory that was asked for."""

    exit_code = 1


def explained(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code of what a person can put right, or did on purpose; None for anything else."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):  # within an import
        return "Stopped by Ctrl-C.", 130
    if asked := _asks_for_devices(error):
        reason = str(error).partition("\n")[0].rpartition(" (")[0].rstrip(".") or "no such device is here"
        return (
            f"{asked}: JAX cannot start: {reason[:300]}; unset what does not fit this machine, and JAX takes what is "
            "there, or install jaxtune[cuda] or jaxtune[tpu]",
            UserError.exit_code,
        )
    if not is_out_of_memory(error):
        return None
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"Out of memory: {first[:300]}\nWhat needs less: a smaller train.batch_size, more train.micro_batches, a "
        "smaller data.max_length, precision.params: bfloat16, tune.method: lora, or more devices in mesh",
        1,
    )


def _asks_for_devices(error: BaseException) -> str:
    """The environment that JAX found no devices for; an empty string for anything else. Where it has passed over all
    that JAX_PLATFORMS names, as cuda without a GPU, it asserts that there is one."""
    if isinstance(error, AssertionError):
        frame = traceback.extract_tb(error.__traceback__)[-1:]
        lacking = [(os.path.basename(at.filename), at.name) for at in frame] == [("xla_bridge.py", "backends")]
    else:
        lacking = isinstance(error, RuntimeError) and str(error).startswith("Unable to initialize backend")
    names = [name for name in ("JAX_PLATFORMS", "XLA_FLAGS") if lacking and os.environ.get(name)]
    return ", ".join(f"{name}={os.environ[name]}" for name in names)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is what XLA or Python raise when memory runs out."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    )


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean "x"?` for the closest of `allowed`, or an empty string."""
    close = get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first `limit` names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
