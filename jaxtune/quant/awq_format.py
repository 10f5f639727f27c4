"""An AWQ file's tensors and the parts of a `Grouped` leaf: exact both ways.

Of a linear map [out N, in K] with G groups a file of version "gemm" has (AutoAWQ 0.2, WQLinear_GEMM):
- `qweight` int32 [K, N / 8]: eight outputs of one input in a word, the nibble i from below being output ORDER[i];
- `qzeros` int32 [G, N / 8]: likewise, the zeros as they are; `scales` float16 [G, N].
"""

import numpy as np

from jaxtune.quant.packing import pack

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SHIFTS = np.argsort(ORDER).astype(np.uint32) * np.uint32(BITS)  # of output j of a word


def by_output(packed: np.ndarray) -> np.ndarray:
    """int32 [R, N / 8] -> uint8 [N, R]: `qweight`'s codes or `qzeros`' zeros."""
    fields = (packed.astype(np.uint32).T[:, None] >> SHIFTS[:, None]).astype(np.uint8) & np.uint8(15)
    return fields.reshape(-1, packed.shape[0])


def codes_of(qweight: np.ndarray) -> np.ndarray:
    """int32 [K, N / 8] -> uint8 [N, K / 2], the stream of bits of packing.py."""
    return pack(by_output(qweight), BITS)


def to_file(codes: np.ndarray) -> np.ndarray:
    """uint8 [N, R] -> int32 [R, N / 8]: `qweight` of codes, or `qzeros` of zeros."""
    fields = codes.reshape(-1, 8, codes.shape[-1]).astype(np.uint32) << SHIFTS[:, None]
    return np.ascontiguousarray(np.bitwise_or.reduce(fields, axis=1).T).view(np.int32)
