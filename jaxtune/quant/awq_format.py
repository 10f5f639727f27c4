"""AWQ checkpoints: their settings, their tensors, and the parts of a `Grouped` leaf; exact both ways.

Of a linear map [out N, in K] with G groups a file of version "gemm" has (AutoAWQ 0.2, WQLinear_GEMM):
- `qweight` int32 [K, N / 8]: eight outputs of one input in a word, the nibble i from below being output ORDER[i];
- `qzeros` int32 [G, N / 8]: likewise, the zeros as they are; `scales` float16 [G, N].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.errors import ModelError
from jaxtune.quant.checkpoints import Tensors
from jaxtune.quant.grouped_files import GroupedFormat, covering, modules_named, settings_of, whole
from jaxtune.quant.packing import pack
from jaxtune.safetensors_io import Index

BITS, PER_WORD = 4, 8
NAMES = {
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size"),
    "version": ("version", "format"),
}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SHIFTS = np.argsort(ORDER).astype(np.uint32) * np.uint32(BITS)  # of output j of a word


def read_format(settings: dict[str, Any], where: str) -> "AWQFormat":
    """What a quantization_config says.

    Raises:
        ModelError: a setting that is wrong, not known, or not supported, by name.
    """
    fields, found = settings_of(settings, where, NAMES)
    version = str(found["version"] or "gemm").lower()
    if version != "gemm":
        raise ModelError(
            f"{where}: version is {found['version']!r}; supported: gemm; take a checkpoint of that version"
        )
    if not fields.flag("zero_point", True):
        fields.refuse("zero_point", "files of version gemm have zero points; allowed: true")
    skipped = modules_named(fields, "modules_to_not_convert") or ()
    return AWQFormat(
        where, whole(found, "bits", where, (BITS,)), whole(found, "group_size", where), False, None, skipped
    )


@dataclass(frozen=True)
class AWQFormat(GroupedFormat):
    @property
    def name(self) -> str:
        return "AWQ"

    def shapes(self, inputs: int, outputs: int, groups: int) -> dict[str, tuple[int, ...]]:
        words = outputs // PER_WORD
        return {"qweight": (inputs, words), "qzeros": (groups, words), "scales": (groups, outputs)}

    def codes(self, tensors: Tensors, module: str, index: Index) -> np.ndarray:
        inputs = tensors.shapes[f"{module}.qweight"][0]
        start, stop, _ = index[1].indices(inputs // 2)
        return pack(self._rows(tensors, f"{module}.qweight", index[0], slice(start * 2, stop * 2)), BITS)

    def zeros(self, tensors: Tensors, module: str, index: Index) -> np.ndarray:
        return self._rows(tensors, f"{module}.qzeros", *index)

    def _rows(self, tensors: Tensors, key: str, outputs: slice, others: slice) -> np.ndarray:
        words, own = covering(outputs, tensors.shapes[key][1] * PER_WORD, PER_WORD)
        return by_output(tensors.read(key, (others, words)))[own]


def by_output(packed: np.ndarray) -> np.ndarray:
    """int32 [R, N / 8] -> uint8 [N, R]: `qweight`'s codes or `qzeros`' zeros."""
    fields = (packed.astype(np.uint32).T[:, None] >> SHIFTS[:, None]).astype(np.uint8) & np.uint8(15)
    return fields.reshape(-1, packed.shape[0])


def to_file(codes: np.ndarray) -> np.ndarray:
    """uint8 [N, R] -> int32 [R, N / 8]: `qweight` of codes, or `qzeros` of zeros."""
    fields = codes.reshape(-1, 8, codes.shape[-1]).astype(np.uint32) << SHIFTS[:, None]
    return np.ascontiguousarray(np.bitwise_or.reduce(fields, axis=1).T).view(np.int32)
