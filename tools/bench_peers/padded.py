"""Rows as the peers that do not pack take them: padded to the longest, as many at once as fit into a step's tokens."""

from collections.abc import Iterator

import numpy as np

from tools.bench_peers.common import Meter, Spec

PAD = 0  # a token of every vocabulary; it stands behind all that is learnt, and is never learnt itself


def batches(spec: Spec, meter: Meter) -> Iterator[dict[str, np.ndarray]]:
    """One batch a step, (rows, tokens) each: input_ids, and as 0 and 1 what is real and what supervised.

    Every batch is counted. Rows are cut at spec.length, and taken again from the first when there are no more.
    """
    rows = spec.read_rows()
    width = min(spec.length, max(len(row["input_ids"]) for row in rows))
    size = spec.batch * spec.length // width
    for step in range(spec.warm + spec.steps):
        taken = [rows[i % len(rows)] for i in range(step * size, (step + 1) * size)]
        batch = {
            "input_ids": padded([row["input_ids"] for row in taken], width, PAD),
            "real": padded([[1] * len(row["input_ids"]) for row in taken], width, 0),
            "supervised": padded([row["supervised"] for row in taken], width, 0),
        }
        meter.counts.append((int(batch["real"].sum()), int(batch["supervised"][:, 1:].sum())))
        yield batch


def padded(rows: list[list[int]], width: int, value: int) -> np.ndarray:
    return np.array([row[:width] + [value] * (width - len(row)) for row in rows], np.int32)
