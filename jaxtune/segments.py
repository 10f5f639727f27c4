"""Segment ids of a row's tokens, which say who may see whom: 1, 2, ... for the documents of a row, and two more."""

from typing import Any

PADDING = 0  # sees padding only
SHARED = -1  # what all documents of a row begin with, written once, at the row's start: every one of them sees it


def sees(queries: Any, keys: Any) -> Any:
    """True where a query of one segment may see a key of another, order aside. Arrays that broadcast."""
    return (queries == keys) | ((keys == SHARED) & (queries != PADDING))
