"""What a check is, and how one is carried out: whatever it raises is its failure, not the doctor's."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtune.errors import explained

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"


class Problem(Exception):
    """What a check found to be wrong, in its message."""


class NotHere(Exception):
    """Why a check has nothing to look at on this machine or in this configuration."""


@dataclass(frozen=True)
class Check:
    """find: what was found, in a line; it raises where that is wrong. advice: what to do then.

    needs_devices: it is skipped where JAX has none.
    """

    name: str
    find: Callable[[], str]
    advice: str
    needs_devices: bool = True


@dataclass(frozen=True)
class Outcome:
    """What came of a check. text: what was found, or what is wrong, or why it was skipped."""

    check: Check
    status: str
    text: str


def carry_out(check: Check) -> Outcome:
    """Never raises, but for Ctrl-C."""
    try:
        return Outcome(check, PASS, check.find())
    except NotHere as reason:
        return Outcome(check, SKIPPED, str(reason))
    except Exception as error:
        return Outcome(check, FAIL, _message(error))


def _message(error: Exception) -> str:
    known = explained(error)
    if known is not None:
        return known[0]
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, Problem) else f"{type(error).__name__}: {text}"
