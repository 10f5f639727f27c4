"""A quantised checkpoint onto the disk: tensors as they come, config and tokenizer beside them, a name at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxtune.hf_write import MARK, new_directory, write_json
from jaxtune.models.config import ModelConfig
from jaxtune.models.families import QUANTIZE_CONFIG
from jaxtune.safetensors_io import INDEX, SINGLE


@contextmanager
def checkpoint_directory(
    out: Path,
    source: Path,
    config: ModelConfig,
    hf: dict[str, Any],
    settings: dict[str, Any],
    num_bytes: int,
    tokenizer: Any = None,
) -> Iterator[Path]:
    """A directory to put weights into. It becomes `out`, with the model's other files, when all went well.

    hf: config.json without its quantization_config, which is `settings`. The others are new_directory's.

    Raises:
        ModelError: `out` holds something else, or cannot be written.
    """
    whole = {**hf, "quantization_config": settings}
    with new_directory(out, source, config, whole, num_bytes, tokenizer) as directory:
        if settings["quant_method"] == "gptq":
            write_json(directory / QUANTIZE_CONFIG, settings)
        yield directory


class ShardWriter:
    """Tensors into files of about the same size, with their index, holding one file's in memory."""

    def __init__(self, directory: Path, max_bytes: int = 4 << 30):
        self._directory, self._max_bytes = directory, max_bytes
        self._waiting: dict[str, np.ndarray] = {}
        self._files: list[list[str]] = []  # the keys of each file that is written
        self._total = 0

    def add(self, tensors: dict[str, np.ndarray]) -> None:
        if self._waiting and _size(self._waiting) + _size(tensors) > self._max_bytes:
            self._flush()
        self._waiting |= tensors

    def close(self) -> None:
        """Write what is left, and give the files the names that say how many there are."""
        self._flush()
        count = len(self._files)
        if count == 1:
            self._part(1).rename(self._directory / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(self._files, 1):
            name = f"model-{number:05}-of-{count:05}.safetensors"
            self._part(number).rename(self._directory / name)
            weight_map |= dict.fromkeys(keys, name)
        write_json(self._directory / INDEX, {"metadata": {"total_size": self._total}, "weight_map": weight_map})

    def _flush(self) -> None:
        self._files.append(list(self._waiting))
        self._total += _size(self._waiting)
        save_file(self._waiting, self._part(len(self._files)), metadata={"format": "pt", MARK: "jaxtune"})
        self._waiting = {}

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number:05}.safetensors"


def _size(tensors: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in tensors.values())
