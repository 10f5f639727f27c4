"""The mean loss of a model on some of a run's own data, by which an export with other weights is judged."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.assemble import Assembled
from jaxtune.config import Config
from jaxtune.data.loader import build_data
from jaxtune.kept import compiled_anew
from jaxtune.leaves import partition
from jaxtune.parallel.layout import Layout
from jaxtune.step import make_eval_step

ROWS = 64  # of data, at most


@dataclass(frozen=True)
class Sample:
    """Rows of data, one in each micro-batch. name: which data, for people."""

    name: str
    batch: dict[str, np.ndarray]

    @property
    def tokens(self) -> int:
        """Those that are supervised."""
        return int(np.count_nonzero(self.batch["mask"]))


def sample_of(config: Config, tokenizer: Any) -> Sample:
    """The first rows of the run's held-out data or, where it holds none out, of its training data.

    Raises:
        DataError: the data cannot be read.
    """
    # Nobody knows how long an epoch of a stream is: of its rows, those of the first block are there.
    once = {"steps": ROWS} if config.data.streaming else {"steps": None, "epochs": 1}
    by_row = config.train.model_copy(update={"batch_size": 1, "micro_batches": 1, **once})
    data = build_data(config.data, config.eval, by_row, tokenizer)
    chosen, name = (data.train, "training data") if data.eval is None else (data.eval, "held-out data")
    rows = [chosen.batch(1 + index).arrays() for index in range(min(ROWS, chosen.rows))]
    return Sample(name, {key: np.concatenate([row[key] for row in rows]) for key in rows[0]})


def mean_loss(assembled: Assembled, sample: Sample) -> float:
    """Over the sample's supervised tokens, computed in float32."""
    trainable, frozen = partition(assembled.params, assembled.mask)
    model = assembled.model
    layout = Layout.of(assembled.mesh, model.config, model.weights, trainable, frozen, zero=3)
    with jax.default_matmul_precision("highest"), compiled_anew(assembled.mesh):
        total, tokens = jax.jit(make_eval_step(model, layout, jnp.float32))(trainable, frozen, sample.batch)
    return float(total / tokens)
