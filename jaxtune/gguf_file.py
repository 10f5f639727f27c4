"""What a .gguf file holds: its fields and where its tensors lie. What they mean is gguf_io.py's work.

Parsing is the gguf library's; every read is checked to lie inside the file.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import ModelError


@dataclass(frozen=True)
class Tensor:
    """A tensor's place in the file. The shape is in the order of Hugging Face, rows first."""

    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUF:
    """The head of a .gguf file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor as float32; a tensor of one dimension is read whole."""
        import gguf

        tensor = self.tensors[name]
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        first, last = (start, stop) if len(tensor.shape) > 1 else (0, 1)
        row_bytes = tensor.num_bytes // rows
        try:
            with open(self.path, "rb") as file:
                file.seek(tensor.offset + first * row_bytes)
                data = np.frombuffer(file.read((last - first) * row_bytes), np.uint8)
            values = gguf.dequantize(data.reshape(last - first, row_bytes), tensor.kind)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: {name} is {tensor.kind.name}, which cannot be read; use F16 or Q8_0"
            ) from None
        except (OSError, ValueError) as problem:
            raise _damaged(self.path, problem) from None
        return values if len(tensor.shape) > 1 else values[0, start:stop]


def read_gguf(path: Path) -> GGUF:
    """The head of a .gguf file, kept for the next call: parsing takes seconds.

    Raises:
        ModelError: the file cannot be read, is damaged, or is one of several.
    """
    try:
        stat = path.stat()
        return _parse(path, stat.st_mtime_ns, stat.st_size)
    except OSError as problem:
        raise ModelError(f"{path}: cannot be read: {problem.strerror}") from None


@lru_cache(maxsize=2)
def _parse(path: Path, changed: int, size: int) -> GGUF:
    import gguf

    class Reader(gguf.GGUFReader):
        """The library's, except that it does not take short slices past the end without a word."""

        @property
        def data(self):
            return self._plain

        @data.setter
        def data(self, mapped):
            # Slices of a plain view are made three times as fast as those of a memmap, and are half as large.
            self._plain = np.asarray(mapped)

        def _get(self, offset, dtype, count=1, *rest, **options):
            if int(offset) + int(count) * np.dtype(dtype).itemsize > size:
                raise ValueError(f"it ends at byte {size}, inside a field or tensor")
            return super()._get(offset, dtype, count, *rest, **options)

    if size == 0:
        raise _damaged(path, "it is empty")
    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            tensor.name: Tensor(
                tuple(int(size) for size in reversed(tensor.shape)),
                tensor.tensor_type,
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as problem:
        raise _damaged(path, problem) from None
    if reader.byte_order != "I":
        raise ModelError(f"{path}: written for a machine of the other byte order; convert it again")
    if (parts := fields.get("split.count", 1)) > 1:
        raise ModelError(f"{path}: one of {parts} parts; join them first: llama-gguf-split --merge FIRST OUT.gguf")
    return GGUF(path, fields, tensors)


def _damaged(path: Path, problem: Any) -> ModelError:
    return ModelError(f"{path}: not a readable GGUF file ({' '.join(str(problem).split())}); download it again")
