"""GPTQ checkpoints: their settings, their tensors, and the parts of a `Grouped` leaf; exact both ways.

Of a linear map [out N, in K], with b bits and G groups, a file has (AutoGPTQ 0.7, GPTQModel 7.7):
- `qweight` int32 [K * b / 32, N]: column n is the stream of bits of output n's codes;
- `qzeros` int32 [G, N * b / 32]: row g is the stream of group g's zeros; of format v1 each zero less 1, modulo 2^b;
- `scales` [G, N]; `g_idx` int32 [K]: the group of each input.
The leaf has them by output: codes uint8 [N, K * b / 8], zeros uint8 [N, G], scales [N, G].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.errors import ModelError
from jaxtune.quant.checkpoints import Tensors
from jaxtune.quant.grouped_files import WORD, GroupedFormat, covering, modules_named, settings_of, whole
from jaxtune.quant.packing import BITS, octets, pack, unpack, words
from jaxtune.safetensors_io import Index

VERSIONS = {"gptq": 1, "gptq_v2": 2}
NAMES = {
    "bits": ("bits", "wbits", "w_bit"),
    "group_size": ("group_size", "q_group_size", "groupsize"),
    "checkpoint_format": ("checkpoint_format", "format"),
}


def read_format(settings: dict[str, Any], where: str) -> "GPTQFormat":
    """What a quantization_config, or a quantize_config.json, says.

    Raises:
        ModelError: a setting that is wrong, not known, or not supported, by name.
    """
    fields, found = settings_of(settings, where, NAMES)
    name = found["checkpoint_format"] or "gptq"
    if name not in VERSIONS:
        raise ModelError(
            f"{where}: checkpoint_format is {name!r}; supported: {', '.join(VERSIONS)}; others are made for one "
            "kind of GPU: take the model that they were made from"
        )
    return GPTQFormat(
        where,
        whole(found, "bits", where, BITS),
        whole(found, "group_size", where),
        fields.flag("desc_act", False) and not fields.flag("static_groups", False),
        modules_named(fields, "modules_in_block_to_quantize"),
        (),
        version=VERSIONS[name],
        symmetric=fields.flag("sym", True),
    )


@dataclass(frozen=True)
class GPTQFormat(GroupedFormat):
    """version: 1, where the file has each zero less 1; 2, where it has them as they are. symmetric: whether every zero
    is in the middle, 2^(bits - 1)."""

    version: int = 1
    symmetric: bool = False

    @property
    def name(self) -> str:
        return f"GPTQ, {self.bits} bits"

    def shapes(self, inputs: int, outputs: int, groups: int) -> dict[str, tuple[int, ...]]:
        return {
            "qweight": (inputs * self.bits // WORD, outputs),
            "qzeros": (groups, outputs * self.bits // WORD),
            "scales": (groups, outputs),
        }

    def codes(self, tensors: Tensors, module: str, index: Index) -> np.ndarray:
        key = f"{module}.qweight"
        rows, own = covering(index[1], tensors.shapes[key][0] * 4, 4)
        return codes_of(tensors.read(key, (rows, index[0])))[:, own]

    def zeros(self, tensors: Tensors, module: str, index: Index) -> np.ndarray:
        key = f"{module}.qzeros"
        words = tensors.shapes[key][1]
        # Whatever the bits, 32 zeros fill `bits` whole words; the last ones may be fewer.
        cut, own = covering(index[0], words * WORD // self.bits, WORD)
        read = tensors.read(key, (index[1], slice(cut.start * self.bits, min(cut.stop * self.bits, words))))
        zeros = zeros_of(read, self.bits, self.version)[own]
        self._check_version(zeros, key)
        return zeros

    def _check_version(self, zeros: np.ndarray, key: str) -> None:
        """Some published files of v2 say that they are of v1, or nothing (vLLM pull request 38966): their codes would
        be read one step off."""
        middle = 2 ** (self.bits - 1)
        if self.version == 1 and self.symmetric and zeros.size and (zeros == middle + 1).all():
            raise ModelError(
                f"{self.where}: {key}: every zero is stored as {middle}; with sym: true, that is how checkpoint_format "
                f"gptq_v2 has them, and gptq, which the settings say or mean, has {middle - 1}; set checkpoint_format: "
                "gptq_v2 in the quantization_config of its config.json, or in quantize_config.json if it is there"
            )


def codes_of(qweight: np.ndarray) -> np.ndarray:
    """int32 [K * b / 32, N] -> uint8 [N, K * b / 8]."""
    return octets(qweight.T)


def zeros_of(qzeros: np.ndarray, bits: int, version: int) -> np.ndarray:
    """int32 [G, N * b / 32] -> uint8 [N, G]. version: 1, where the file has each zero less 1; 2, where it has them."""
    stored = unpack(octets(qzeros), bits)
    zeros = (stored + np.uint8(1)) & np.uint8(2**bits - 1) if version == 1 else stored
    return np.ascontiguousarray(zeros.T)


def to_file(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, version: int) -> dict[str, np.ndarray]:
    """The tensors `qweight`, `qzeros` and `scales` of unpacked codes uint8 [N, K], scales and zeros [N, G].

    K * bits and N * bits are divisible by 32.
    """
    stored = (zeros - np.uint8(1)) & np.uint8(2**bits - 1) if version == 1 else zeros
    return {
        "qweight": np.ascontiguousarray(words(pack(codes, bits)).T),
        "qzeros": words(pack(np.ascontiguousarray(stored.T), bits)),
        "scales": np.ascontiguousarray(scales.T),
    }
