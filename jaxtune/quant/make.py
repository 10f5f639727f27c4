"""`jaxtune quantize`: from a model and, where there is some, calibration data to a quantised checkpoint, and what it
costs in perplexity."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxtune.assemble import Source
from jaxtune.config import DataSection, EvalSection, ModelSection, TrainSection
from jaxtune.console import Bar, console, say, stage
from jaxtune.data.loader import Dataset, build_data
from jaxtune.data.report import check_positions
from jaxtune.errors import ConfigError, ModelError
from jaxtune.files import check_new, expanded, sole_writer
from jaxtune.hf_io import check_weights, open_source
from jaxtune.models.decoder import Model
from jaxtune.models.weights import Tree, leaves_with_path
from jaxtune.quant.makers import Maker
from jaxtune.quant.sweep import ORDER, Stream, Sweep
from jaxtune.quant.write import ShardWriter, checkpoint_directory

ROWS = 8  # of data that go through a layer together


@dataclass(frozen=True)
class Calibration:
    """The data: files, the format of their rows, and how much of them is used."""

    data: str
    eval: str | None = None
    format: str = "text"
    samples: int = 128  # rows of `length` tokens, packed
    length: int = 512


@dataclass(frozen=True)
class Quantized:
    """What was made. Perplexities are (the original model's, the new one's)."""

    directory: Path
    calibration: tuple[float, float] | None
    eval: tuple[float, float] | None


def quantize_model(path: str, out: str | Path, maker: Maker, calibration: Calibration | None = None) -> Quantized:
    """Write the model at `path`, quantised, into the new directory `out`. calibration: a maker that needs the inputs
    of linear maps has to have it.

    Raises:
        UserError: of the kind that fits; the message names what is wrong. Nothing is left under `out` then.
    """
    if maker.needs_inputs and calibration is None:
        raise ConfigError("this way of quantising needs calibration data")
    out = expanded(out)
    check_new(out, ModelError)
    stage(f"Reading {path}")
    source = Source.open(ModelSection(path=path))
    model, tensors = Model.create(source.config), open_source(source.path, source.config.tied)
    _check_model(model, source, maker)
    check_weights(tensors, model.weights)
    about = source.path, source.config, source.config.hf, maker.settings(), _bytes(model.weights)
    with sole_writer(out, ModelError), checkpoint_directory(out, *about) as directory:
        streams = _streams(calibration, source)
        writer = ShardWriter(directory)
        with jax.default_matmul_precision("highest"):
            sweep = Sweep(model, tensors)
            _copy(writer, sweep, model)
            _layers(sweep, streams, maker, writer)
            perplexities = [*(sweep.perplexity(stream) for stream in streams), None, None]
        writer.close()
    return Quantized(out, *perplexities[:2])


def _check_model(model: Model, source: Source, maker: Maker) -> None:
    if source.config.hf.get("quantization_config") is not None:
        raise ModelError(f"{source.path}: is quantised already; give the model that it was made from")
    for paths in ORDER:
        for path in paths:
            weight = dict(leaves_with_path(model.weights["stacks"]["0"]))[path]
            maker.check(weight.keys[0], weight.shape)


def _streams(calibration: Calibration | None, source: Source) -> list[Stream]:
    """Of the calibration data and of the data to compare on, where they are given."""
    if calibration is None:
        return []
    stage("Reading the data")
    section = DataSection.model_validate(
        {"path": calibration.data, "format": calibration.format, "max_length": calibration.length}
        | ({} if calibration.format == "text" else {"train_on_prompt": True})
    )
    data = build_data(
        section, EvalSection(path=calibration.eval), TrainSection(batch_size=ROWS, epochs=1), source.tokenizer
    )
    streams = []
    for name, part in (("Calibration", data.train), ("Evaluation", data.eval)):
        if part is not None:
            say(_told(name, part, calibration.samples))
            check_positions(part, source.config, "--length")
            streams.append(Stream.of(part, calibration.samples))
    return streams


def _told(name: str, data: Dataset, samples: int) -> str:
    return f"{name}: {min(samples, data.rows)} of {data.rows} rows of {data.shape[-1]} tokens"


def _layers(sweep: Sweep, streams: list[Stream], maker: Maker, writer: ShardWriter) -> None:
    """Every layer, one after another."""
    count = sweep.model.config.num_layers
    bar = Bar(count) if console.is_terminal else None
    if bar:
        bar.start()
    try:
        sweep.start(streams)
        for number in range(count):

            def change(key: str, weight: jax.Array, gram: jax.Array | None) -> jax.Array:
                tensors, values = maker.make(key, weight, gram)
                writer.add(tensors)
                return values

            apart = sweep.layer(number, streams, change, maker.needs_inputs)
            text = "" if apart is None else f"outputs off by {apart:.2%}"
            if bar:
                bar.update(number + 1, text)
            else:
                say(f"Layer {number + 1} of {count}{text and f': {text}'}")
    finally:
        if bar:
            bar.stop()


def _copy(writer: ShardWriter, sweep: Sweep, model: Model) -> None:
    """What is not quantised, as it is."""
    linear = {path for paths in ORDER for path in paths}
    for path, weight in leaves_with_path(model.weights):
        if path[0] == "stacks" and path[2:] in linear:
            continue
        for key in weight.keys:
            whole = tuple(slice(0, size) for size in weight.shape)
            writer.add({key: np.ascontiguousarray(sweep.source.read(key, whole))})


def _bytes(weights: Tree) -> int:
    """Room that is enough: no weight takes more than 2 bytes a number, and the ends as many as they have."""
    return sum(2 * int(np.prod(weight.full_shape)) for _, weight in leaves_with_path(weights))
