"""Documents longer than a row, cut into pieces that fit: where each piece begins, and how long it is."""

from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """All int64 [pieces], in the order of the documents and within each from left to right."""

    documents: np.ndarray  # of which document it is
    offsets: np.ndarray  # its first token, counted from the document's first
    lengths: np.ndarray


def split(lengths: np.ndarray, room: int) -> Pieces:
    """Cut documents into pieces of at most `room` tokens, 2 or more; what fits stays whole.

    A piece begins with the last token of the piece before it, where that token is learnt: the first token of a row's
    segment never is. So every token of a document but its first is learnt exactly once.

    lengths: int [documents], each 2 or more.
    """
    counts: np.ndarray = -(-(lengths - 1) // (room - 1))
    documents: np.ndarray = np.repeat(np.arange(len(lengths)), counts)
    first: np.ndarray = np.repeat(np.cumsum(counts) - counts, counts)
    offsets = (np.arange(len(documents)) - first) * (room - 1)
    return Pieces(documents, offsets, np.minimum(lengths[documents] - offsets, room))
