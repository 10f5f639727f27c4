"""Data: files to batches. `build_data` is the way in."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.data.loader import Batch, Data, Dataset, build_data

__all__ = ["Batch", "Data", "Dataset", "build_data"]


def __getattr__(name: str) -> Any:
    """Imported when they are first used: the workers that tokenise need no JAX, which takes seconds to start."""
    if name in __all__:
        from jaxtune.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
