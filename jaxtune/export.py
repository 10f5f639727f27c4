"""What comes out of a run: the adapter or model that training ends with, and the exports made from it later.

File formats are peft_io.py's and hf_write.py's; merging is tune/merge.py's.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxtune import processes, tune
from jaxtune.api import LoadedModel
from jaxtune.assemble import FULL, Assembled, Source
from jaxtune.config import Config, ModelSection
from jaxtune.console import stage
from jaxtune.errors import AdapterError, ConfigError, DataError, ModelError, SaveError, UserError
from jaxtune.files import check_new, expanded, sole_writer, unwritten
from jaxtune.hf_write import check_settings, write_model
from jaxtune.loading import Opened, open_adapter, open_model, open_run, require_run
from jaxtune.mesh import single_device_mesh
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import Model
from jaxtune.models.weights import HOOKS, Tree
from jaxtune.onto import ALLOWED, Onto, choose
from jaxtune.quant.again import write_quantized
from jaxtune.rundir import read_record, result_directory
from jaxtune.sample_loss import Sample, mean_loss, sample_of
from jaxtune.section import TuneSection
from jaxtune.tune.merge import merged
from jaxtune.tune.peft_io import save_adapter

FORMATS = ("peft", "hf")
# Largest logit difference between the run and its export, as a share of the largest logit. In float32 only the
# order of additions differs; narrower types round every weight, and a wrong export is off by far more than that.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
PROBE_ROWS, PROBE_LENGTH = 4, 64


def check_result(run_dir: Path, section: TuneSection, source: Source) -> None:
    """Refuse before the first step what `write_result` would refuse after the last.

    Raises:
        ModelError: the tokenizer or the generation config cannot go along with a whole model.
    """
    if processes.is_first() and not tune.has_adapter(section):
        check_settings(run_dir, source.path, source.config, source.tokenizer)


def write_result(
    run_dir: Path, section: TuneSection, assembled: Assembled, params: Tree, dtype: str, base: ModelSection
) -> Path:
    """Write what training ends with, and give its directory: `adapter/` (PEFT) or `model/` (Hugging Face).

    section: of the configuration, resolved or not. params: the whole tree as trained, `combine(trainable, frozen)`.
    dtype: of the model's files, `precision.params`; an adapter is float32. base: what PEFT is told of the base model.
    Every process calls this. Each directory appears whole, under its name, at the end; one from before is replaced.

    Raises:
        SaveError: it cannot be written.
    """
    directory = result_directory(run_dir, section)
    try:
        if tune.has_adapter(section):
            _write_adapter(directory, section, assembled, params, base)
        else:
            _write_model(directory, assembled, merged(params), dtype)  # a base may be quantised
    except (AdapterError, ModelError) as error:
        raise SaveError(
            f"{error}; every step is saved: put that right, then run the same command again, which writes the result"
        ) from None
    return directory


@dataclass(frozen=True)
class Losses:
    """Mean losses over a sample of the run's own data."""

    run: float
    written: float
    data: str  # held-out data | training data
    tokens: int  # supervised ones


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its logits are from what was to be written."""

    directory: Path
    difference: float  # the largest one
    largest: float  # logit, by size
    tolerance: float  # share of `largest` that `difference` may be
    step: int | None  # of the checkpoint that it was made from; None: the run has finished
    onto: str = ""  # the weights that a run over a quantised base was merged into
    losses: Losses | None = None  # where these make it another model than the run's


def export_run(
    run_dir: str | Path,
    out: str | Path,
    format: str,
    dtype: str = "float32",
    onto: str | None = None,
    base: str | None = None,
) -> Exported:
    """Write the model of a run to the new directory `out`, as a PEFT adapter or as a merged Hugging Face model.

    dtype: float32 | bfloat16 | float16, of a merged model's weights; an adapter is float32. What was written is
    read again and compared with the run; only then does it get its name. A run that has not finished gives the
    model of its last valid checkpoint.

    onto: original | dequantized | quantized: what a run over a quantised base is merged into (onto.py). The first and
    the last are other models than the run's: then the mean losses of both are measured as well. base: the model that
    a quantised checkpoint was made from.

    Raises:
        ConfigError: an unknown format or dtype, peft for a run that trained no adapter, or an `onto` that is not to be
            had.
        DataError: the data that losses are measured on cannot be read.
        ModelError: `out` is there already, or what was written gives other logits than it should or too high a loss.
        SaveError: the disk is full.
    """
    out = expanded(out)
    _check_request(out, format, dtype, onto, base)
    require_run(run_dir)
    stage(f"Reading the run {run_dir}")
    opened = open_run(run_dir, "float32", single_device_mesh())
    _check_run(run_dir, opened, format)
    target = choose(opened, onto, base) if format == "hf" else Onto()
    sample = None if target.is_exact else _sample(opened)
    before = 0.0 if sample is None else mean_loss(opened.assembled, sample)
    if target.base is not None:
        stage(f"Reading {target.base.path}")
        del opened  # never both
        opened = open_run(run_dir, "float32", single_device_mesh(), target.base)
    with _unchecked(out) as unchecked:
        stage(f"Writing {out}")
        config, step = opened.run, opened.step
        probe, expected = _write(unchecked, opened, format, dtype, target)
        del opened
        stage("Reading it again")
        again = open_model(unchecked) if format == "hf" else _on_base(config, unchecked, run_dir)
        found = LoadedModel(again).logits(probe)
        report = _compare(out, expected, found, TOLERANCE["float32" if format == "peft" else dtype], step)
        if sample is not None:
            losses = Losses(before, mean_loss(again.assembled, sample), sample.name, sample.tokens)
            report = replace(report, losses=_checked(out, losses))
    return replace(report, onto=target.words)


@contextmanager
def _unchecked(out: Path) -> Iterator[Path]:
    """The directory to write, under a temporary name. Without an error it then gets its own.

    Raises:
        ModelError: `out` is there already or cannot be replaced, or another process writes it.
    """
    unchecked = out.parent / f".{out.name}.unchecked"
    try:
        with sole_writer(out, ModelError):
            try:
                shutil.rmtree(unchecked, ignore_errors=True)
                yield unchecked
                check_new(out, ModelError)  # not every file system has locks, and not every program takes them
                _take_name(unchecked, out)
            finally:
                shutil.rmtree(unchecked, ignore_errors=True)
    except (AdapterError, ModelError) as error:
        raise _named(error, unchecked, out) from None


def _take_name(unchecked: Path, out: Path) -> None:
    try:
        unchecked.rename(out)
    except OSError as problem:
        raise unwritten(ModelError, out, problem) from None


def _on_base(config: Config, adapter: Path, run_dir: str | Path) -> Opened:
    """The adapter on the run's base model."""
    record = {**read_record(require_run(run_dir)), "fingerprints": {}}  # of the base: it was looked at before
    return open_adapter(config, adapter, "float32", record=record)


def _named(error: UserError, unchecked: Path, out: Path) -> UserError:
    """The error with the name that the user gave, and what to do where the disk is full."""
    text = str(error).replace(str(unchecked), str(out))
    if error.exit_code == SaveError.exit_code:
        return SaveError(f"{text}; make room, or mend the disk, then run the same command again")
    return type(error)(text)


def _check_run(run_dir: str | Path, opened: Opened, format: str) -> None:
    """Whether the run's model can be written so."""
    method = opened.section.method
    if format == "peft" and not tune.has_adapter(opened.section):
        raise ConfigError(f"{run_dir}: trained with tune.method {method}, so it has no adapter; take the format hf")
    if format == "hf" and not opened.assembled.model.hooks.merges:
        raise ConfigError(
            f"{run_dir}: what tune.method {method} trains is no part of the model's weights and cannot be merged into "
            "them; take the format peft"
        )


def _sample(opened: Opened) -> Sample:
    """What to measure losses on."""
    try:
        return sample_of(opened.run, opened.assembled.source.tokenizer)
    except DataError as error:
        raise DataError(
            f"{error}\nThe loss of what is written would be measured on it; bring the data back, or take onto "
            "dequantized, which computes what the run does and needs none"
        ) from None


def probe_tokens(config: ModelConfig, virtual: int = 0) -> np.ndarray:
    """Token ids to compare two models on: random ones, which reach more of the embedding than a text does.

    virtual: how many virtual tokens will stand before them.
    """
    length = min(PROBE_LENGTH, config.max_positions - virtual)
    return np.random.default_rng(0).integers(0, config.vocab_size, (PROBE_ROWS, length))


def _check_request(out: Path, format: str, dtype: str, onto: str | None, base: str | None) -> None:
    for name, value, allowed in (
        ("format", format, FORMATS),
        ("dtype", dtype, TOLERANCE),
        ("onto", onto, (None, *ALLOWED)),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} {value!r}; allowed: {', '.join(filter(None, allowed))}")
    if format == "peft" and dtype != "float32":
        raise ConfigError(f"dtype {dtype} is of a merged model; an adapter is float32")
    if format == "peft" and (onto or base):
        raise ConfigError(f"{f'onto {onto}' if onto else f'base {base}'}: is of a merged model; take the format hf")
    check_new(out, ModelError)


def _write(directory: Path, opened: Opened, format: str, dtype: str, target: Onto) -> tuple[np.ndarray, np.ndarray]:
    """Write, and give token ids and the logits that what was written should have for them."""
    assembled = opened.assembled
    model = assembled.model
    probe = probe_tokens(model.config, model.hooks.virtual_tokens)
    if target.makers:
        return probe, _write_quantized(directory, assembled, merged(assembled.params), dtype, target).logits(probe)
    expected = LoadedModel(opened).logits(probe)
    if format == "peft":
        _write_adapter(directory, opened.section, assembled, assembled.params, opened.run.model)
    else:
        _write_model(directory, assembled, merged(assembled.params), dtype)
    return probe, expected


def _write_adapter(
    directory: Path, section: TuneSection, assembled: Assembled, params: Tree, base: ModelSection
) -> None:
    words = assembled.source.tokenizer if assembled.source.adds_words else None
    save_adapter(directory, section, assembled.model.weights, params, base.path, words, base.revision)


def _write_model(directory: Path, assembled: Assembled, params: Tree, dtype: str) -> None:
    model, source = assembled.model, assembled.source
    weights = _own_weights(assembled)
    write_model(directory, params, weights, model.config, source.path, dtype, tokenizer=source.tokenizer)


def _write_quantized(directory: Path, assembled: Assembled, params: Tree, dtype: str, target: Onto) -> LoadedModel:
    """Write, and give the model that what was written stands for."""
    config, source, weights = assembled.model.config, assembled.source, _own_weights(assembled)
    how = dtype, target.makers, target.settings, source.tokenizer
    values = write_quantized(directory, params, weights, config, source.path, *how)
    plain = replace(assembled, model=Model.create(config, assembled.model.stacks), params=values)
    return LoadedModel(Opened(plain, FULL, np.dtype("float32")))


def _own_weights(assembled: Assembled) -> Tree:
    """The declarations without a tuning method's."""
    return {name: part for name, part in assembled.model.weights.items() if name != HOOKS}


def _compare(out: Path, expected: np.ndarray, found: np.ndarray, tolerance: float, step: int | None) -> Exported:
    """The report, or ModelError when what was written is not the run's model."""
    if expected.shape != found.shape:
        raise ModelError(f"{out}: logits {found.shape}, of the run {expected.shape}; nothing was kept")
    difference, largest = float(np.abs(expected - found).max()), float(np.abs(expected).max())
    if not difference <= tolerance * largest:
        raise ModelError(
            f"{out}: what was written gives other logits than the run: the largest difference is {difference:.3g}, "
            f"allowed {tolerance:g} of the largest logit, {largest:.3g}; nothing was kept"
        )
    return Exported(out, difference, largest, tolerance, step)


def _checked(out: Path, losses: Losses) -> Losses:
    """Refuse a broken model. Rounding sound weights otherwise costs some tenths of a nat at 4 bits. Twice the loss,
    that is the square of the perplexity, or a nat more where it is below one, is what wrong weights cost, such as those
    of another model.

    Raises:
        ModelError: the loss is not finite, or more than that.
    """
    allowed = losses.run + max(losses.run, 1.0)
    if not losses.written <= allowed:
        raise ModelError(
            f"{out}: the mean loss of what was written is {losses.written:.4f} on {losses.data}, the run's is "
            f"{losses.run:.4f}, allowed {allowed:.4f}: these are not the weights that the adapter was trained on, or "
            "too few bits for them; nothing was kept. Take onto dequantized"
        )
    return losses
