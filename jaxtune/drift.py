"""What may change between a run's start and its resumption: fields of the configuration, and files that it reads.

Nothing is decided here about directories; rundir.py asks.
"""

import hashlib
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.config import Config
from jaxtune.errors import CheckpointError

REFUSE = "refuse"  # it would alter the tree of weights, or which batch a step sees
LOG = "log"  # the steps that follow differ, as the user wishes; said as a warning
ALLOW = "allow"  # it changes where, when or how, never what is computed (but for rounding); said

# Every field of the configuration has to choose; those of a tuning method are all refused.
RULES = {
    "tune": REFUSE,
    "model.path": REFUSE,
    "model.revision": REFUSE,
    "model.tokenizer": REFUSE,
    "model.init": REFUSE,
    "model.overrides": REFUSE,
    "model.quantize": REFUSE,
    "model.double_quant": REFUSE,
    "data.path": REFUSE,
    "data.sources": REFUSE,
    "data.dataset": REFUSE,
    "data.dataset_dir": REFUSE,
    "data.format": REFUSE,
    "data.columns": REFUSE,
    "data.without": REFUSE,
    "data.tags": REFUSE,
    "data.system": REFUSE,
    "data.split": REFUSE,
    "data.subset": REFUSE,
    "data.revision": REFUSE,
    "data.on_bad_line": REFUSE,
    "data.num_samples": REFUSE,
    "data.dialect": REFUSE,
    "data.template": REFUSE,
    "data.max_length": REFUSE,
    "data.too_long": REFUSE,
    "data.train_on_prompt": REFUSE,
    "data.train_roles": REFUSE,
    "data.train_on": REFUSE,
    "data.turn_end": REFUSE,
    "data.packing": REFUSE,
    "data.share_prefix": REFUSE,
    "data.shuffle": REFUSE,
    "data.streaming": REFUSE,
    "data.shuffle_buffer": REFUSE,
    "data.cache": ALLOW,
    "train.output_dir": ALLOW,  # the directory was moved
    "train.steps": LOG,  # the batch of a step stays; the schedule stretches
    "train.epochs": LOG,
    "train.batch_size": REFUSE,
    "train.micro_batches": ALLOW,
    "train.seed": REFUSE,
    "train.skip_spikes": LOG,
    "train.max_bad_steps": ALLOW,
    "optim.name": REFUSE,  # its state is another tree
    "optim.lr": LOG,
    "optim.schedule": LOG,
    "optim.warmup": LOG,
    "optim.decay": LOG,
    "optim.min_lr": LOG,
    "optim.beta1": LOG,
    "optim.beta2": LOG,
    "optim.eps": LOG,
    "optim.momentum": REFUSE,  # from or to 0 its state is another tree
    "optim.weight_decay": LOG,
    "optim.clip_norm": LOG,
    "mesh.data": ALLOW,
    "mesh.fsdp": ALLOW,
    "mesh.tensor": ALLOW,
    "mesh.context": ALLOW,
    "mesh.pipe": ALLOW,
    "mesh.zero": ALLOW,
    "mesh.sequence_parallel": ALLOW,
    "mesh.context_attention": ALLOW,
    "mesh.schedule": ALLOW,
    "mesh.virtual_stages": ALLOW,
    "memory.remat": ALLOW,
    "memory.offload": ALLOW,
    "memory.unroll": ALLOW,
    "memory.gradients": LOG,
    "memory.attention": LOG,
    "precision.params": REFUSE,
    "precision.compute": LOG,
    "precision.loss_scale": LOG,  # with another initial the scale begins again
    "precision.matmul": LOG,
    "precision.float8_scaling": REFUSE,  # its histories are part of the state
    "precision.float8_history": REFUSE,
    "checkpoint.every": ALLOW,
    "checkpoint.keep": ALLOW,
    "checkpoint.resume": ALLOW,
    "eval.every": ALLOW,
    "eval.fraction": REFUSE,  # the rows that are left to train on
    "eval.path": LOG,
    "eval.split": LOG,
    "log.every": ALLOW,
    "log.tensorboard": ALLOW,
}

# What becomes of rows of which "error" lets none pass: whoever goes on from there had none.
UNUSED_SO_FAR = {"on_bad_line", "too_long"}
ABSENT = "absent"  # an entry that a mapping does not have
WEIGHTS = (".safetensors", ".safetensors.index.json")
SETTINGS = {"config.json", "quantize_config.json", "adapter_config.json"}  # others are of tokenizers and of generating
WHOLE_BYTES = 1 << 30  # a file up to this size is read whole
BLOCK, STRIDE = 1 << 12, 1 << 20  # of a larger one, the first BLOCK of every STRIDE


@dataclass(frozen=True)
class Change:
    """A field that has another value than when the run was last started."""

    key: str
    old: Any
    new: Any

    @property
    def rule(self) -> str:
        parts = self.key.split(".")
        if parts[0] == "data" and parts[-1] in UNUSED_SO_FAR and self.old == "error":
            return LOG
        return RULES["tune" if parts[0] == "tune" else ".".join(parts[:2])]

    def __str__(self) -> str:
        return f"{self.key}: was {_shown(self.old)}, now {_shown(self.new)}"


def changes(old: Config, new: Config) -> list[Change]:
    """Every field that differs, a mapping's entries one by one; and the order of entries, where it decides."""
    before, after = (dict(_fields(config.model_dump())) for config in (old, new))
    keys = [*before, *(key for key in after if key not in before)]
    pairs = ((key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys)
    return [Change(key, old, new) for key, old, new in pairs if old != new] + list(_moved(old, new))


def _moved(old: Config, new: Config) -> Iterator[Change]:
    for name in getattr(new.tune, "PATTERNS", ()):
        before, after = (list(getattr(config.tune, name, ())) for config in (old, new))
        if before != after and sorted(before) == sorted(after):
            yield Change(f"tune.{name}, in order", before, after)


def _fields(tree: dict[Any, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def is_print_of(told: str, path: Path) -> bool:
    """Whether a fingerprint, by a rule of now or before, is of what lies there.

    Raises:
        CheckpointError: as fingerprint.
    """
    return told == fingerprint(path) or told == fingerprint(path, settings=(), endings=(*WEIGHTS, "config.json"))


def fingerprint(path: Path, settings: Container[str] = SETTINGS, endings: tuple[str, ...] = WEIGHTS) -> str:
    """SHA-256 of a model's or adapter's weights and settings: of a directory, or of a .gguf file.

    Every file's name and size counts, and its bytes: all of them up to 1 GiB, and of a larger file 4 KiB of each
    MiB, which an edit of any tensor but a small one does not miss. Tokenizers do not count: they have a fingerprint
    of their own. Dates and places do not either: a copy is the same model.

    Raises:
        CheckpointError: a file cannot be read.
    """
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name in settings or p.name.endswith(endings))
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.name if path.is_dir() else ''} {file.stat().st_size}\n".encode())
            _add(digest, file)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _add(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    block, stride = (STRIDE, STRIDE) if size <= WHOLE_BYTES else (BLOCK, STRIDE)
    with path.open("rb", buffering=0) as file:
        for start in range(0, size, stride):
            file.seek(start)
            digest.update(file.read(block))
