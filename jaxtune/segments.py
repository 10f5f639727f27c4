"""Segment ids of a row's tokens, which say who may see whom: 1, 2, ... for the documents of a row, and two more."""

from typing import Any

PADDING = 0  # sees padding only
SHARED = -1  # what all documents of a row begin with, written once, at the row's start: every one of them sees it


def sees(queries: Any, keys: Any, distance: Any, window: Any) -> Any:
    """True where a query of one segment sees a key of another that stands `distance` places before it.

    window: how many keys back a query sees, itself counted; None: all of them. Arrays that broadcast.
    """
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return near & ((queries == keys) | ((keys == SHARED) & (queries != PADDING)))
