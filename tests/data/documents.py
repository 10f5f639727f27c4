"""Some documents, and Megatron's files of them."""

from pathlib import Path

from jaxtune.data.megatron import DTYPES, DatasetWriter

DOCUMENTS = [[3, 1, 4, 1, 5], [9], [], [2, 6], [5, 3, 5, 8, 9, 7, 9]]


def write(prefix: Path, texts=DOCUMENTS, dtype=DTYPES[4]) -> str:
    """A data set of the texts; its prefix."""
    with DatasetWriter(str(prefix), dtype) as writer:
        for text in texts:
            writer.add_document(text)
        writer.finalize()
    return str(prefix)
