"""Where a model lies on disk: a directory, a .gguf file, or a snapshot fetched from the Hugging Face hub."""

import re
from contextlib import suppress
from pathlib import Path

from jaxtune.errors import ModelError, UserError, listing, nearest
from jaxtune.files import expanded

# Weights as safetensors and settings as text: nothing in a snapshot can run. Sub-directories hold
# other formats, and more chat templates.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "tokenizer.model.v*"]
IGNORED = ["*/*.safetensors", "*/*.json", "*/*.txt", "consolidated*"]
ADAPTER_CONFIG = "adapter_config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_model(path: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local directory or .gguf file of a model.

    path: a directory (Hugging Face's, or one that holds a single .gguf), a .gguf file, or a hub id.
    revision: of a hub id: branch, tag or commit.
    weights: whether a hub id's weights are fetched, or its settings and tokenizer only.

    Raises:
        ModelError: nothing is there, or the hub cannot be reached; what to do is said.
    """
    local = expanded(path)
    try:
        if not local.exists():
            return _snapshot(path, revision, weights)
        if revision is not None:
            raise ModelError(f"model.revision {revision}: {path} is a local path; a revision is of a hub id")
        if local.is_dir():
            return _directory(local, weights)
    except OSError as problem:
        raise ModelError(f"{problem.filename}: cannot be read: {problem.strerror}") from None
    if local.suffix == ".gguf":
        return local
    raise ModelError(f"{path}: not a model; allowed: a Hugging Face directory, a .gguf file or a hub id")


def holds_adapter(path: Path) -> bool:
    """Whether an adapter lies in a model's directory."""
    return (path / ADAPTER_CONFIG).is_file()


def _directory(path: Path, weights: bool) -> Path:
    names = sorted(entry.name for entry in path.iterdir())
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf and not any(name.endswith(".safetensors") for name in names):
        if len(gguf) > 1:
            raise ModelError(f"{path}: {len(gguf)} .gguf files ({listing(gguf)}); give the path of one")
        return path / gguf[0]
    if ADAPTER_CONFIG in names and ("config.json" not in names or (weights and not any(map(_is_of_weights, names)))):
        raise ModelError(
            f"{path}: a PEFT adapter, not a model; give its base model, and this directory as adapter (tune.adapter)"
        )
    if not any(name.endswith(".json") for name in names):
        raise ModelError(
            f"{path}: expected config.json and *.safetensors, or one .gguf; found {listing(names) or 'nothing'}"
        )
    return path


def _is_of_weights(name: str) -> bool:
    """Whether it is a file of a model's weights, pickled ones too; not of an adapter's."""
    return name.startswith("pytorch_model") or (name.endswith(".safetensors") and not name.startswith("adapter_"))


def _snapshot(path: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if not HUB_ID.fullmatch(path):
        raise ModelError(f"{path}: no such file or directory, and not a hub id (owner/name){_beside(path)}")
    check_cache(path, ModelError)
    patterns = PATTERNS if weights else PATTERNS[1:]
    try:
        fetched = snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED)
    except (OSError, HFValidationError) as problem:
        raise ModelError(why(path, revision, problem) + _beside(path)) from None
    if not (Path(fetched) / "config.json").exists() and not (Path(fetched) / "tokenizer_config.json").exists():
        raise ModelError(
            f"{path}: this hub repository has no config.json; download its .gguf, if any, and give that path"
        )
    return Path(fetched)


def _beside(path: str) -> str:
    """Of a path at which no model is, the one beside it of nearly that name."""
    local = expanded(path)
    with suppress(OSError):
        entries = [entry for entry in local.parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
        return nearest(local.name, [entry.name for entry in entries])
    return ""


def check_cache(path: str, error: type[UserError]) -> None:
    """Refuse to ask the hub for `path` where it would look for a home directory, to keep it in, and find none.

    Raises:
        error: with what to set.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_CACHE.startswith("~"):
        raise error(
            f"{path}: no such directory here, and what the hub has finds no place: your home directory cannot be "
            "found; set HOME, or HF_HOME to a directory that you may write to"
        )


def why(path: str, revision: str | None, problem: Exception, kind: str = "model") -> str:
    """What stopped the download, and what to do. kind: what `path` is the id of, a model or a data set."""
    from huggingface_hub import errors

    if isinstance(problem, errors.GatedRepoError):
        return f"{path}: this {kind} is gated; accept its licence on its hub page and log in with `hf auth login`"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return f"{path}: no such directory here and no such {kind} on the hub; if it is private, `hf auth login` first"
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"{path}: the hub has no revision {revision}; check {kind.split()[0]}.revision"
    first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return (
        f"{path}: no such directory here, and the hub cannot be used ({first[:300]}); check the connection"
        f" (HF_ENDPOINT, HF_HUB_OFFLINE), or download the {kind} elsewhere and give its directory"
    )
