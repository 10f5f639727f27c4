"""jaxtune: fine-tune and train decoder language models in JAX, from Hugging Face files to Hugging Face files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.api import LoadedModel, load_model, train

__all__ = ["LoadedModel", "load_model", "train"]
__version__ = "0.1.3"


def __getattr__(name: str) -> Any:
    """The Python calls, imported when they are first used: JAX takes seconds to start."""
    if name in __all__:
        from jaxtune import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
