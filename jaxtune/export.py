"""What comes out of a run: the adapter or model that training ends with, and the exports made from it later.

File formats are peft_io.py's and hf_write.py's; merging is tune/merge.py's.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import tune
from jaxtune.api import LoadedModel
from jaxtune.assemble import Assembled, Source
from jaxtune.console import stage
from jaxtune.errors import ConfigError, ModelError
from jaxtune.hf_write import write_model
from jaxtune.loading import ADAPTER, MODEL, Opened, open_adapter, open_model, open_run, require_run
from jaxtune.mesh import single_device_mesh
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import HOOKS, Tree
from jaxtune.section import TuneSection
from jaxtune.tokenizer import load_tokenizer
from jaxtune.tune.merge import merged
from jaxtune.tune.peft_io import save_adapter

FORMATS = ("peft", "hf")
# Largest logit difference between the run and its export, as a share of the largest logit. In float32 only the
# order of additions differs; narrower types round every weight, and a wrong export is off by far more than that.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
PROBE_ROWS, PROBE_LENGTH = 4, 64


def result_directory(run_dir: Path, section: TuneSection) -> Path:
    """Where training with this method puts its result."""
    return run_dir / (ADAPTER if tune.has_adapter(section) else MODEL)


def write_result(
    run_dir: Path, section: TuneSection, assembled: Assembled, params: Tree, dtype: str, base_model: str
) -> Path:
    """Write what training ends with, and give its directory: `adapter/` (PEFT) or `model/` (Hugging Face).

    section: of the configuration, resolved or not. params: the whole tree as trained, `combine(trainable, frozen)`.
    dtype: of the model's files, `precision.params`; an adapter is float32. base_model: `model.path`, for PEFT.
    Every process calls this. Each directory appears whole, under its name, at the end; one from before is replaced.
    """
    directory = result_directory(run_dir, section)
    if tune.has_adapter(section):
        words = assembled.source.tokenizer if assembled.source.adds_words else None
        save_adapter(directory, section, assembled.model.weights, params, base_model, words)
    else:
        _write_model(directory, assembled, merged(params), dtype)  # a base may be quantised
    return directory


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its logits are from the run's."""

    directory: Path
    difference: float  # the largest one
    largest: float  # logit of the run, by size
    tolerance: float  # share of `largest` that `difference` may be
    step: int | None  # of the checkpoint that it was made from; None: the run has finished


def export_run(run_dir: str | Path, out: str | Path, format: str, dtype: str = "float32") -> Exported:
    """Write the model of a run to the new directory `out`, as a PEFT adapter or as a merged Hugging Face model.

    dtype: float32 | bfloat16 | float16, of a merged model's weights; an adapter is float32. What was written is
    read again and compared with the run; only then does it get its name. A run that has not finished gives the
    model of its last valid checkpoint.

    Raises:
        ConfigError: an unknown format or dtype, or peft for a run that trained no adapter.
        ModelError: `out` is there already, or what was written gives other logits than the run.
    """
    out = Path(out).expanduser()
    _check_request(out, format, dtype)
    require_run(run_dir)
    stage(f"Reading the run {run_dir}")
    opened = open_run(run_dir, "float32", single_device_mesh())
    config, step, method = opened.run, opened.step, opened.section.method
    if format == "peft" and not tune.has_adapter(opened.section):
        raise ConfigError(f"{run_dir}: trained with tune.method {method}, so it has no adapter; take the format hf")
    model = opened.assembled.model
    if format == "hf" and model.hooks.computes:
        raise ConfigError(
            f"{run_dir}: what tune.method {method} trains is no part of the model's weights and cannot be merged into "
            "them; take the format peft"
        )
    probe = probe_tokens(model.config, model.hooks.virtual_tokens)
    expected = LoadedModel(opened).logits(probe)
    unchecked = out.parent / f".{out.name}.unchecked"
    shutil.rmtree(unchecked, ignore_errors=True)
    try:
        stage(f"Writing {out}")
        _write(unchecked, opened, format, dtype)
        del opened
        stage("Reading it again")
        again = open_adapter(config, unchecked, "float32") if format == "peft" else open_model(unchecked)
        found = LoadedModel(again).logits(probe)
        report = _compare(out, expected, found, TOLERANCE["float32" if format == "peft" else dtype], step)
        unchecked.rename(out)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    return report


def probe_tokens(config: ModelConfig, virtual: int = 0) -> np.ndarray:
    """Token ids to compare two models on: random ones, which reach more of the embedding than a text does.

    virtual: how many virtual tokens will stand before them.
    """
    length = min(PROBE_LENGTH, config.max_positions - virtual)
    return np.random.default_rng(0).integers(0, config.vocab_size, (PROBE_ROWS, length))


def _check_request(out: Path, format: str, dtype: str) -> None:
    for name, value, allowed in (("format", format, FORMATS), ("dtype", dtype, TOLERANCE)):
        if value not in allowed:
            raise ConfigError(f"{name} {value!r}; allowed: {', '.join(allowed)}")
    if format == "peft" and dtype != "float32":
        raise ConfigError(f"dtype {dtype} is of a merged model; an adapter is float32")
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ModelError(f"{out}: is there already; give a new directory, or remove it")


def _write(directory: Path, opened: Opened, format: str, dtype: str) -> None:
    assembled = opened.assembled
    if format == "peft":
        base, words = opened.run.model.path, assembled.source.tokenizer if assembled.source.adds_words else None
        save_adapter(directory, opened.section, assembled.model.weights, assembled.params, base, words)
    else:
        _write_model(directory, assembled, merged(assembled.params), dtype)


def _write_model(directory: Path, assembled: Assembled, params: Tree, dtype: str) -> None:
    model, source = assembled.model, assembled.source
    weights = {name: part for name, part in model.weights.items() if name != HOOKS}
    write_model(directory, params, weights, model.config, source.path, dtype, tokenizer=_own_tokenizer(source))


def _own_tokenizer(source: Source) -> Any:
    """The tokenizer, where it is not just that which lies with the model and goes along as it is."""
    try:
        plain = load_tokenizer(source.path)
    except ModelError:  # there is none
        return source.tokenizer
    mine, theirs = ((t.backend_tokenizer.to_str(), t.chat_template) for t in (source.tokenizer, plain))
    return None if mine == theirs else source.tokenizer


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
