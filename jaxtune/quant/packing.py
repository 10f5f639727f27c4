"""Codes of 2, 3, 4 or 8 bits as a stream of bits, in bytes or in GPTQ's 32-bit words.

The stream is that of GPTQ's files (AutoGPTQ's QuantLinear.pack): code j has bits b*j to b*j + b - 1, lowest first,
whether or not it straddles a byte or a word. A little-endian word is four bytes of the stream, so that going from one
to the other is a change of view.
"""

import math
from typing import Any

import numpy as np

BITS = (2, 3, 4, 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., n] -> uint8 stream [..., n * bits / 8]; n * bits must be divisible by 8."""
    count, per = unit(bits)
    word = sum(codes[..., i::per].astype(np.uint32) << np.uint32(bits * i) for i in range(per))
    octets = [(word >> np.uint32(8 * i)).astype(np.uint8) for i in range(count)]
    return np.stack(octets, axis=-1).reshape(*codes.shape[:-1], -1)


def unpack(stream: Any, bits: int) -> Any:
    """uint8 stream [..., m] -> uint8 codes [..., 8 * m / bits]. Of numpy's arrays or of jax's."""
    count, per = unit(bits)
    kind = np.uint8 if count == 1 else np.uint32
    octets = stream.reshape(*stream.shape[:-1], -1, count).astype(kind)
    word = octets[..., 0]
    for i in range(1, count):
        word = word | (octets[..., i] << kind(8 * i))
    codes = (word[..., None] >> np.arange(0, bits * per, bits, dtype=kind)) & kind(2**bits - 1)
    return codes.reshape(*stream.shape[:-1], -1).astype(np.uint8)


def unit(bits: int) -> tuple[int, int]:
    """(bytes, codes) of the shortest stretch of the stream that holds whole codes in whole bytes."""
    together = math.lcm(bits, 8)
    return together // 8, together // bits


def words(stream: np.ndarray) -> np.ndarray:
    """uint8 [..., 4 * n] -> int32 [..., n], the same bits."""
    return np.ascontiguousarray(stream).view("<i4").astype(np.int32, copy=False)


def octets(words: np.ndarray) -> np.ndarray:
    """int32 [..., n] -> uint8 [..., 4 * n], the same bits."""
    return np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
