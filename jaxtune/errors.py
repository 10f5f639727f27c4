"""Every error that a user can cause. The command line prints the message alone and exits with code 2.

A message says where, what was found, what is allowed, and what to do.
"""

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


class SaveError(CheckpointError):
    """A checkpoint could not be written: no fault in what the user asked for, but the run cannot go on."""

    exit_code = 1


class TrainingStopped(UserError):
    """Training has come to nothing, though no input was found to be wrong."""

    exit_code = 1


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean "x"?` for the closest of `allowed`, or an empty string."""
    close = get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first `limit` names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
