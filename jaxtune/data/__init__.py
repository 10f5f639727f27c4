"""Data: files to batches. `build_data` is the way in."""

from jaxtune.data.loader import Batch, Data, Dataset, build_data

__all__ = ["Batch", "Data", "Dataset", "build_data"]
