"""The whole configuration: typed, strict, one YAML file plus `section.key=value` overrides.

Each section's docstring and field comments are the reference; `docs/config.md` is made from nothing else.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from jaxtune.data_section import DataSection
from jaxtune.elsewhere import METHOD_NAMES
from jaxtune.errors import ConfigError, listing, nearest
from jaxtune.files import expanded
from jaxtune.mistakes import explain, shown, source_of
from jaxtune.section import LARGEST, Fraction, NonNegative, Positive, Section, TuneSection
from jaxtune.yaml_text import dump_yaml, parse_argument, parse_yaml

MAX_CONFIG_BYTES = 1 << 20


class ModelSection(Section):
    """Which model."""

    path: str  # hub id, local Hugging Face directory, or a .gguf file
    revision: str | None = None  # of a hub id: branch, tag or commit
    tokenizer: str | None = None  # a directory or hub id, when the model's own is not the one to use
    init: Literal["pretrained", "random"] = "pretrained"  # random: train from scratch
    overrides: dict[str, Any] = {}  # Hugging Face config fields to change; only with init: random
    quantize: Literal["nf4", "fp4", "int8", "int4"] | None = None  # of the layers' linear maps, which then stay frozen
    double_quant: bool = False  # nf4 and fp4: their scales are quantised too

    @model_validator(mode="after")
    def _nothing_unused(self):
        if self.double_quant and self.quantize not in ("nf4", "fp4"):
            found = f"with {self.quantize}" if self.quantize else "without it"
            raise ValueError(f"double_quant belongs to quantize nf4 and fp4 and would do nothing {found}")
        if self.overrides and self.init != "random":
            raise ValueError("overrides: the weights of a pretrained model fix its settings; set model.init: random")
        return self


class TrainSection(Section):
    """How long and how much at once."""

    output_dir: str = "runs/default"  # the run directory: one run each
    steps: Positive | None = None  # wins over epochs
    epochs: Annotated[float, Field(gt=0, le=100_000)] = 3  # for more, set steps: epochs take time to count
    batch_size: Positive = 8  # sequences (packs, when packing) of an optimiser step, all devices together
    micro_batches: Positive = 1  # equal parts of the batch, one after another
    seed: NonNegative = 0  # of the data's order, first values and dropout
    # a step is not applied when its loss is so many standard deviations above the mean of the last 128 good ones, of
    # which there must be 16; 6 is usual. null: only what is not finite is skipped
    skip_spikes: Annotated[float, Field(gt=0)] | None = None
    max_bad_steps: Positive = 10  # stop after this many skipped steps in a row


class OptimSection(Section):
    """How the weights move."""

    name: Literal["adamw", "adamw_8bit", "adam", "sgd", "lion", "adafactor"] = "adamw"  # 8bit: moments in 2 bytes
    lr: Annotated[float, Field(gt=0)] = 1.0e-4
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay
    warmup: Annotated[float, Field(ge=0)] = 0.03  # below 1: a share of all steps; else a number of steps
    decay: Annotated[float, Field(gt=0)] = 0.1  # wsd: the decay's length, counted as warmup is
    min_lr: Fraction = 0.0  # share of lr at the end
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999  # lion: 0.99 is usual
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    momentum: Fraction = 0.0  # sgd
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # not on norms and biases
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0  # null: no clipping

    @model_validator(mode="after")
    def _nothing_unused(self):
        adams = ("adamw", "adamw_8bit", "adam")
        users = {"beta1": (*adams, "lion"), "beta2": (*adams, "lion"), "eps": adams, "momentum": ("sgd",)}
        phases = {"decay": ("wsd",), "min_lr": ("linear", "cosine", "wsd")}
        for chosen, table in ((self.name, users), (self.schedule, phases)):
            for name, owners in table.items():
                if chosen not in owners and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to {', '.join(owners)} and would do nothing with {chosen}")
        return self


Axis = Annotated[int, Field(ge=-1, le=LARGEST)]
AXES = ("pipe", "data", "fsdp", "context", "tensor")  # of the mesh; neighbours along the last are nearest


class MeshSection(Section):
    """How many devices along each axis, -1 taking what is left of them, and what each axis does."""

    data: Axis = 1  # the batch is split, the weights are whole
    fsdp: Axis = -1  # the batch is split, and what `zero` says; data x fsdp is hybrid sharding
    tensor: Axis = 1  # heads, MLP and vocabulary are split
    context: Axis = 1  # every sequence is split
    pipe: Axis = 1  # the layers are split into stages; micro-batches follow one another through them
    zero: Literal[0, 1, 2, 3] = 3  # split over fsdp: 1 optimiser state, 2 and gradients, 3 and weights (FSDP); 0 none
    sequence_parallel: bool = False  # norms and residuals are split along the sequence over the tensor axis
    context_attention: Literal["ring", "ulysses"] = "ring"  # keys go round, or heads are exchanged for sequence
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"  # of the pipeline
    virtual_stages: Positive = 1  # chunks of layers that each stage holds; interleaved: 2 or more

    @property
    def sizes(self) -> dict[str, int]:
        """Of each axis, in the order of AXES; -1 is not filled in."""
        return {axis: getattr(self, axis) for axis in AXES}

    @model_validator(mode="after")
    def _one_free_axis(self):
        if 0 in self.sizes.values():
            raise ValueError("an axis has size 0; allowed: 1 or more, or -1 for what is left")
        if list(self.sizes.values()).count(-1) > 1:
            raise ValueError(f"at most one axis may be -1, found {self.sizes}")
        return self

    @model_validator(mode="after")
    def _nothing_unused(self):
        owners = {
            "zero": "fsdp",
            "sequence_parallel": "tensor",
            "context_attention": "context",
            "schedule": "pipe",
            "virtual_stages": "pipe",
        }
        for name, axis in owners.items():
            if getattr(self, axis) == 1 and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for the {axis} axis, which is 1: it would do nothing")
        if (self.schedule == "interleaved") != (self.virtual_stages > 1):
            raise ValueError("virtual_stages of 2 or more goes with schedule interleaved, and 1 with the others")
        return self


REMAT_POLICIES = ("none", "dots", "block", "full")
REMAT_NAMES = ("query", "key", "value", "attended", "after_attention", "gate", "up", "down")


class MemorySection(Section):
    """What is kept, where, and in how many bits: memory against time."""

    # of a layer, for its backward pass. none: everything; dots: the results of its matmuls; names: these alone;
    # block: its input; full: the inputs of every few layers
    remat: Literal["none", "dots", "block", "full"] | list[str] = [
        "query",
        "key",
        "value",
        "after_attention",
        "gate",
        "up",
    ]
    offload: list[Literal["optimizer", "activations", "params"]] = []  # lies in the host's memory until needed
    gradients: Literal["float32", "compute"] = "float32"  # type of their sum over devices and micro-batches
    # the layers stand in the program one after another, not in a loop: neither weights nor what a layer keeps are then
    # copied out of stacks and into them, and compiling takes several times as long; auto: in a long run on one GPU
    unroll: Literal["auto"] | bool = "auto"
    # of whole sequences, by plain XLA or in a way that never has all scores in memory: tiles on a CPU, cudnn on an
    # NVIDIA GPU, splash on a TPU. auto: that of the platform where it fits; a kernel of a GPU or TPU is tried at the
    # start, and has to agree with plain XLA
    attention: Literal["auto", "xla", "tiles", "cudnn", "splash"] = "auto"

    @field_validator("remat", mode="before")
    @classmethod
    def _known(cls, found: Any) -> Any:
        names = found if isinstance(found, list) else [found]
        known = REMAT_NAMES if isinstance(found, list) else REMAT_POLICIES
        if names and all(isinstance(name, str) and name in known for name in names):
            return found
        policies, every = ", ".join(REMAT_POLICIES), (*REMAT_POLICIES, *REMAT_NAMES)
        unknown = next((name for name in names if name not in known), found)
        close = (
            f"; write [{found}]" if isinstance(found, str) and found in REMAT_NAMES else nearest(f"{unknown}", every)
        )
        raise ValueError(f"allowed: {policies}, or a list of names of {', '.join(REMAT_NAMES)}{close}")

    @field_validator("offload", mode="before")
    @classmethod
    def _listed(cls, found: Any) -> Any:
        if isinstance(found, str):
            raise ValueError(f"it is a list: write [{found}]")
        return found

    @model_validator(mode="after")
    def _fitting(self):
        if len(set(self.offload)) < len(self.offload):
            raise ValueError("offload: a name stands twice")
        if "activations" in self.offload and not isinstance(self.remat, list):
            raise ValueError("offload activations moves what remat names, so remat has to be a list of names")
        return self


class LossScale(Section):
    """The factor of a float16 loss: halved where a gradient overflows, which skips the step, and doubled in time."""

    initial: Annotated[float, Field(ge=1)] = 65536.0
    window: Positive = 2000  # good steps in a row after which it is doubled


class PrecisionSection(Section):
    """On a GPU and a TPU bfloat16 is what the matmuls gain from, and on a CPU that has units for it.

    float16 is for devices without bfloat16: weights stay float32 beside it, since float16 ones would lose every step
    below 1/2048 of their size, and the loss is scaled.
    """

    params: Literal["float32", "bfloat16"] = "float32"  # of the model's weights; adapters are float32
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16, or float32 on a CPU
    loss_scale: LossScale = LossScale()  # with compute float16
    matmul: Literal["default", "float8"] = "default"  # of the layers' linear maps: e4m3 forward, e5m2 backward
    float8_scaling: Literal["current", "delayed"] = "current"  # by a tensor's own largest number, or the last steps'
    float8_history: Positive = 16  # delayed: how many steps

    @model_validator(mode="after")
    def _nothing_unused(self):
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        if self.matmul != "float8" and self.float8_scaling != defaults["float8_scaling"]:
            raise ValueError("float8_scaling belongs to matmul float8 and would do nothing without it")
        if self.float8_scaling != "delayed" and self.float8_history != defaults["float8_history"]:
            raise ValueError("float8_history belongs to float8_scaling delayed and would do nothing with current")
        if self.compute != "float16" and self.loss_scale != LossScale():
            raise ValueError(f"loss_scale belongs to compute float16 and would do nothing with {self.compute}")
        return self


class CheckpointSection(Section):
    """What a kill cannot take."""

    every: Positive = 100  # steps
    keep: Annotated[int, Field(ge=2, le=LARGEST)] = 2  # the latest ones
    resume: Literal["auto", "never"] = "auto"  # never: refuse a directory that has a run in it


class EvalSection(Section):
    """Held-out data: a share of the rows, or a file."""

    every: NonNegative = 0  # steps; 0: only at the end
    fraction: Fraction = 0.0  # of the rows of data, chosen by the seed
    path: str | list[str] | None = None  # in the format and columns of data
    split: str | None = None  # where path is of a data set on the hub; null: validation

    @model_validator(mode="after")
    def _one_source(self):
        if self.split is not None and self.path is None:
            raise ValueError("split belongs to path and would do nothing without it")
        if self.path in ("", []) or (isinstance(self.path, list) and "" in self.path):
            raise ValueError("path is empty: name a file, a directory or the id of a data set, or leave it out")
        if self.path is not None and self.fraction > 0:
            raise ValueError("eval.path and eval.fraction are both set; keep one")
        if self.every and not {"fraction", "path"} & self.model_fields_set:  # fraction: 0 turns it off by intent
            raise ValueError("every would do nothing without held-out data; set eval.fraction or eval.path")
        return self


class LogSection(Section):
    """What is written beside the ledger."""

    every: Positive = 10  # steps
    tensorboard: bool = True  # events in tensorboard/ of the run directory


class Config(Section):
    """One run."""

    model: ModelSection
    tune: SerializeAsAny[TuneSection]  # of the method's own kind; absent: lora with its defaults
    data: DataSection
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    mesh: MeshSection = MeshSection()
    memory: MemorySection = MemorySection()
    precision: PrecisionSection = PrecisionSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in a YAML file, with `section.key=value` overrides put over it.

    Raises:
        ConfigError: the file, a key or a value is wrong; the message names each.
    """
    path = expanded(path)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes; a config has at most {MAX_CONFIG_BYTES}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else shown(tree)
        raise ConfigError(f"{path}: expected sections ({listing(Config.model_fields, 20)}), found {found}")
    for override in overrides:
        _apply_override(tree, override)
    return make_config(tree, str(path), overrides)


def make_config(tree: dict, where: str = "config", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration that a plain dict of sections describes. A path in it may be a Path.

    overrides: what the command line put into it; a mistake in their keys is said to be the command line's.
    """
    tree, wrong = _as_in_yaml(tree), []
    try:
        tune = make_tune(tree.get("tune", {}))
        method = tune.method
    except ValidationError as error:
        # Any method will do while the other sections are looked at.
        tune, wrong = make_tune({}), [{**item, "loc": ("tune", *item["loc"])} for item in error.errors()]
        method = _method(tree["tune"])
    except ConfigError as error:
        raise ConfigError(f"{source_of(('tune', 'method'), where, overrides)}: {error}") from None
    try:
        config = Config.model_validate({**tree, "tune": tune})
    except ValidationError as error:
        wrong += error.errors()  # type: ignore[arg-type]
    if not wrong:
        return config
    raise ConfigError("\n".join(explain(wrong, Config, tree, method, where, overrides)))


def _as_in_yaml(value: Any) -> Any:
    """The same with text in the place of each Path."""
    if isinstance(value, dict):
        return {key: _as_in_yaml(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_as_in_yaml(part) for part in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def tune_section(**options: Any) -> TuneSection:
    """As make_tune."""
    return make_tune(options)


def make_tune(options: Any) -> TuneSection:
    """The section of the tuning method that `options` name; without a name, of the adapter's, or of lora.

    Raises:
        ConfigError: there is no such method.
        AdapterError: no method is named, and the adapter is none that we know.
        ValidationError: an option is not one of the method's, or has a wrong value.
    """
    if isinstance(options, TuneSection):
        return options
    if not isinstance(options, dict):
        raise ConfigError(f"tune: expected a section with a method, found {shown(options)}")
    from jaxtune.tune import METHODS

    method = _method(options)
    if not isinstance(method, str) or method not in METHODS:
        other = METHOD_NAMES.get(f"{method}".lower())
        hint = f"; write {other}." if other else nearest(f"{method}", METHODS) or "."
        raise ConfigError(f"tune.method: no method {shown(method)}{hint} Allowed are {', '.join(METHODS)}")
    return METHODS[method].section.model_validate({**options, "method": method})


def _method(options: dict) -> Any:
    """The method that the options name, else that of the adapter that they start from. Where no adapter can be read
    it is lora, and what is wrong is said when the adapter is opened."""
    from jaxtune.tune.peft_config import CONFIG_NAME, method_of

    adapter = options.get("adapter")
    try:
        if "method" not in options and isinstance(adapter, str) and (expanded(adapter) / CONFIG_NAME).is_file():
            return method_of(Path(adapter))
    except OSError:  # a name that is too long, a directory that may not be entered
        pass
    return options.get("method", "lora")


def _apply_override(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2 or not all(parts) or key.startswith("-"):
        raise ConfigError(f'override "{override}": expected section.key=value, such as train.steps=100')
    for part in parts[:-1]:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise ConfigError(f'override "{override}": "{part}" is not a section')
    tree[parts[-1]] = parse_argument(value, f'override "{override}"')


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same."""
    return dump_yaml(config.model_dump())
