"""From a path to a model ready to be asked: a model directory, a .gguf, a hub id, an export, or a run of ours.

Training does not pass through here; assemble.py is what both stand on.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from pydantic import ValidationError

from jaxtune import checkpoint, restack, tune
from jaxtune.assemble import FULL, Assembled, Source, assemble
from jaxtune.config import Config, MeshSection, ModelSection, load_config
from jaxtune.console import warn
from jaxtune.cpu_bfloat16 import has_units
from jaxtune.drift import is_print_of
from jaxtune.errors import AdapterError, CheckpointError, ConfigError, MeshError, ModelError
from jaxtune.files import expanded
from jaxtune.leaves import Leaf, combine, fields_of, partition, rebased
from jaxtune.mesh import complete, make_mesh, single_device_mesh
from jaxtune.models.weights import Tree, Weight, map_tree
from jaxtune.number_types import compute_dtype
from jaxtune.rundir import ADAPTER, CHECKPOINTS, CONFIG, MODEL, has_weights, read_record, result_directory
from jaxtune.section import TuneSection
from jaxtune.tokenizer import is_tokenizer_print
from jaxtune.tune.peft_config import read_config, warn_of_another_base

INFERENCE_AXES = ("data", "fsdp", "tensor")
DTYPES = ("float32", "bfloat16", "auto")
LARGE = 16 << 20  # bytes of a layer, from which on an answer of 150 tokens wins back what layers apart take to compile
ATTEMPTS = 5  # to read a checkpoint of a run that goes on


@dataclass(frozen=True)
class Opened:
    """A model with its parameters, and what is known of the run that it comes from."""

    assembled: Assembled
    section: TuneSection  # of the parameters as they are here
    dtype: Any  # of the weights and the computation
    config: Config | None = None  # of the run
    step: int | None = None  # the checkpoint's, where the run has not finished

    @property
    def run(self) -> Config:
        """The configuration of the run that it comes from."""
        assert self.config is not None
        return self.config

    @property
    def system(self) -> str | None:
        """The system line that the run's conversations had, of whichever source; None: none, or not the same."""
        return None if self.config is None else self.config.data.common_system


def open_model(
    path: str | Path, adapter: str | Path | None = None, dtype: str = "float32", mesh: Mesh | dict | None = None
) -> Opened:
    """Load a model from wherever `path` says, onto `mesh`.

    path: a Hugging Face directory, a .gguf file, a hub id, an exported model, or a run directory.
    adapter: a PEFT directory to put on it. dtype: float32 | bfloat16 | auto (bfloat16, or float32
    on a CPU); adapters stay float32. mesh: None, one device; or sizes of axes, such as {"fsdp": 8}; or a mesh.

    Raises:
        UserError: of the kind that fits; the message names what is wrong.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    for name, found in (("path", path), ("adapter", "" if adapter is None else adapter)):
        if not isinstance(found, str | os.PathLike):
            raise ConfigError(f"{name} {found!r:.80}; expected text or a Path")
    kind, places = compute_dtype(dtype), as_mesh(mesh)
    if is_run(path):
        if adapter is not None:
            raise AdapterError(f"{path} is a run, with weights of its own; give its base model with adapter {adapter}")
        return open_run(path, kind.name, places)
    section = FULL if adapter is None else read_config(Path(adapter))
    if adapter is not None:
        warn_of_another_base(adapter, path)
    source = Source.open(ModelSection(path=str(path)), tuning=section)
    return Opened(_placed(source, places, dtype=kind.name), source.tuning, kind)


def as_mesh(mesh: Mesh | dict | None) -> Mesh:
    """The mesh that a person asked for."""
    if mesh is None:
        return single_device_mesh()
    if isinstance(mesh, Mesh):
        return _for_inference(complete(mesh))
    try:
        section = MeshSection.model_validate(mesh)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(["mesh", *map(str, found["loc"])])
        raise MeshError(f"{where}: {found['msg']}; axes are {', '.join(INFERENCE_AXES)}") from None
    return _for_inference(make_mesh(section))


def _for_inference(mesh: Mesh) -> Mesh:
    others = [axis for axis, size in mesh.shape.items() if size > 1 and axis not in INFERENCE_AXES]
    if others:
        raise MeshError(
            f"mesh: {', '.join(others)} is for training alone; a loaded model takes {', '.join(INFERENCE_AXES)}"
        )
    return mesh


def is_run(path: str | Path) -> bool:
    """Whether `path` is a directory that training writes to."""
    directory = expanded(path)
    # os.path's answer where a directory may not be read is no; what reads the model there says why.
    return os.path.isfile(directory / CONFIG) and not os.path.exists(directory / "config.json")


def require_run(path: str | Path) -> Path:
    """The directory of a run, or CheckpointError."""
    if not is_run(path):
        raise CheckpointError(f"{path}: not a run: no {CONFIG} in it; give the train.output_dir of a run")
    return expanded(path)


def open_run(path: str | Path, dtype: str, mesh: Mesh, base: ModelSection | None = None) -> Opened:
    """The model of a run: what it ended with or, while it has not ended, its last valid checkpoint, which is said.

    base: a model to put what the run trained on, in place of the run's own.

    Raises:
        CheckpointError: not a run, or one that has saved nothing yet.
    """
    directory = require_run(path)
    config, record = load_config(directory / CONFIG), read_record(directory)
    if base is not None:
        record = record if base.path == config.model.path else {**record, "fingerprints": {}}
        config = config.model_copy(update={"model": base})
    if _is_finished(directory, config):
        if tune.has_adapter(config.tune):
            return open_adapter(config, directory / ADAPTER, dtype, mesh, record)
        told = (record.get("fingerprints") or {}).get("tokenizer")
        made = _placed(Source.open(ModelSection(path=str(directory / MODEL)), noted=told), mesh, dtype=dtype)
        if base is not None:
            made = _with_trained(made, _assemble(config, FULL, dtype, mesh, record), config.tune)
        return Opened(made, FULL, jnp.dtype(dtype), config)
    if not checkpoint.saved_steps(directory / CHECKPOINTS):
        raise CheckpointError(
            f"{path}: this run has not finished and has no checkpoint yet; let it train, or take its base model, "
            f"{config.model.path}"
        )
    assembled, step = _restored(directory, config, dtype, mesh, record)
    if base is None:
        warn(f"{path}: this run has not finished; this is its checkpoint of step {step}")
    return Opened(assembled, assembled.source.tuning, jnp.dtype(dtype), config, step)


def _is_finished(directory: Path, config: Config) -> bool:
    """Whether its result is there, and is not that of a shorter run which goes on now."""
    return has_weights(result_directory(directory, config.tune)) and read_record(directory).get("finished", True)


def open_adapter(
    config: Config, adapter: Path, dtype: str, mesh: Mesh | None = None, record: dict[str, Any] | None = None
) -> Opened:
    """The base model of a run with this adapter on it. record: the run's, of what its files were then."""
    section = read_config(adapter)
    assembled = _assemble(config, section, dtype, single_device_mesh() if mesh is None else mesh, record or {})
    return Opened(assembled, assembled.source.tuning, jnp.dtype(dtype), config)


def _assemble(config: Config, section: TuneSection, dtype: str, mesh: Mesh, record: dict[str, Any]) -> Assembled:
    """The run's base model, with the template that the run had, under this section."""
    template, prints = record.get("template"), record.get("fingerprints") or {}
    words, told = config.model.tokenizer or config.model.path, prints.get("tokenizer")
    try:
        source = Source.open(config.model, config.data.template if template is None else None, section, noted=told)
    except ModelError as error:
        is_there = os.path.exists(expanded(config.model.path))
        hint = (
            "; a relative path counts from where the run was started; where the model was moved, the run's own command "
            "with the new model.path notes it"
        )
        raise ModelError(f"{error} (model.path of the run{'' if is_there else hint})") from None
    if template is not None:
        if prints and config.data.template is None and source.tokenizer.chat_template != template:
            warn(f"{words}: has another chat template than when the run began; the run's own is used")
        source.tokenizer.chat_template = template  # its file may be another by now, or gone
    if told is not None and not is_tokenizer_print(told, source.tokenizer):
        raise CheckpointError(
            f"{words}: this tokenizer is not the one that the run began with; bring the old files back"
        )
    if prints.get("model") is not None and not is_print_of(prints["model"], source.path):
        raise CheckpointError(
            f"{config.model.path}: this base model is not the one that the run began with; bring the old files back"
        )
    return _placed(
        source,
        mesh,
        init=config.model.init,
        dtype=dtype,
        quantized_from=config.precision.params,
        seed=config.train.seed,
    )


def _placed(source: Source, mesh: Mesh, dtype: str, **settings: Any) -> Assembled:
    """`assemble` for drawing tokens."""
    apart = _pays_apart(source, mesh, dtype)
    return assemble(source, source.tuning, mesh, dtype=dtype, layers_apart=apart, **settings)


def _pays_apart(source: Source, mesh: Mesh, dtype: str) -> bool:
    """Whether layers are not to lie in stacks, out of which XLA copies every weight before it multiplies.

    On a CPU that takes longer than the products for a single token, and compiling layers by themselves some seconds;
    elsewhere it was not measured. Weights that have to be made float32 first, of codes or of bfloat16 where the CPU has
    no units for it, XLA would make of all layers at once.
    """
    is_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    is_large = source.config.layer_weights * jnp.dtype(dtype).itemsize >= LARGE
    return is_cpu and is_large and source.scheme is None and (dtype == "float32" or bool(has_units()))


def _with_trained(made: Assembled, base: Assembled, section: TuneSection) -> Assembled:
    """A run's whole model with the base's weights where the run trained none. Neither has an adapter."""
    trained = tune.METHODS[section.method].trained(tune.resolve(section), base.model.weights)

    def pick(weight: Weight, mine: jax.Array, other: jax.Array) -> jax.Array:
        flags = np.array([key in trained for key in weight.keys])
        return jnp.where(
            flags.reshape(-1, *[1] * len(weight.shape)) if weight.layers is not None else flags, mine, other
        )

    return replace(made, params=map_tree(pick, base.model.weights, made.params, base.params))


def _restored(directory: Path, config: Config, dtype: str, mesh: Mesh, record: dict[str, Any]) -> tuple[Assembled, int]:
    """The run's model with what its last valid checkpoint holds in place of the first values, and that one's step."""
    # What trains has the type that the checkpoint has it in: an adapter float32, a whole model the run's own.
    # An adapter that took its start away from the weights goes with what is left of them in the run's type.
    is_adapter, rebases = tune.has_adapter(config.tune), tune.METHODS[config.tune.method].rebases
    loaded = dtype if is_adapter and not rebases else config.precision.params
    assembled = _assemble(config, config.tune, loaded, mesh, record)
    trainable, frozen = partition(assembled.params, assembled.mask)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trainable)
    home, source = directory / CHECKPOINTS, assembled.source

    def take(step: int) -> Tree:
        saved, own = checkpoint.arrays(home, step), assembled.model.stacks
        way = restack.move({"trainable": shapes}, saved, source.tuning, source.config, own)
        return way.joined(checkpoint.restore(home, step, way.needed, partial=True), {})

    found, step = _from_last(home, take)
    if rebases:
        frozen = map_tree(lambda leaf: rebased(leaf, lambda base: _cast_leaf(base, dtype)), frozen)
    params = combine(found["trainable"], frozen)
    return replace(assembled, params=params if is_adapter or loaded == dtype else _cast(params, dtype)), step


def _from_last(home: Path, take: Callable[[int], Tree]) -> tuple[Tree, int]:
    """What `take(step)` gives of the last valid checkpoint, and its step. A live run may delete the one that is read:
    then of the one that is the last by now."""
    for _ in range(ATTEMPTS):
        before = checkpoint.saved_steps(home)
        try:
            step = checkpoint.latest_valid(home)
            if step is not None:
                return take(step), step
        except CheckpointError:
            if checkpoint.saved_steps(home) == before:
                raise
    raise CheckpointError(
        f"{home}: the run deletes its checkpoints before they are read; wait for its end, or start it again with a "
        "larger checkpoint.keep or checkpoint.every"
    )


def _cast(params: Tree, dtype: str) -> Tree:
    return map_tree(lambda leaf: _cast_leaf(leaf, dtype), params)


def _cast_leaf(leaf: Any, dtype: str) -> Any:
    """The leaf with its parts in this type, but for those that keep theirs, such as a quantised weight's."""
    if not isinstance(leaf, Leaf):
        return None if leaf is None else leaf.astype(dtype)
    parts = {name: _cast_leaf(getattr(leaf, name), dtype) for name in fields_of(leaf) if name not in leaf.EXACT}
    return replace(leaf, **parts)  # type: ignore[type-var]
