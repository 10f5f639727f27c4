"""A GPTQ file's tensors and the parts of a `Grouped` leaf: exact both ways.

Of a linear map [out N, in K], with b bits and G groups, a file has (AutoGPTQ 0.7, GPTQModel 7.7):
- `qweight` int32 [K * b / 32, N]: column n is the stream of bits of output n's codes;
- `qzeros` int32 [G, N * b / 32]: row g is the stream of group g's zeros; of format v1 each zero less 1, modulo 2^b;
- `scales` [G, N]; `g_idx` int32 [K]: the group of each input.
The leaf has them by output: codes uint8 [N, K * b / 8], zeros uint8 [N, G], scales [N, G].
"""

from typing import NamedTuple

import numpy as np

from jaxtune.quant.packing import octets, pack, unpack, words


class Parts(NamedTuple):
    """Of one layer, or of a part of its rows and inputs."""

    codes: np.ndarray  # uint8 [N, K * b / 8]
    scales: np.ndarray  # [N, G]
    zeros: np.ndarray  # uint8 [N, G]


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
