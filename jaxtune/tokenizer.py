"""The model's tokenizer: loaded without torch and without running a repository's code, and checked.

Rendering of conversations and masks is data/'s work; making one from a .gguf is gguf_tokenizer.py's.
"""

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jaxtune.console import warn
from jaxtune.errors import ModelError
from jaxtune.files import expanded, inside, read_json
from jaxtune.section import LARGEST

# When it is imported, transformers would say that PyTorch is missing, as if something were wrong.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# What ends a turn in the templates in use; a template is searched for them, not run.
END_OF_TURN = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|end|>", "<|eot|>"),
    *("<|end_of_text|>", "<|endoftext|>", "</s>", "<EOT>"),
)
NEEDED = "a tokenizer.json is needed, and code of its own is never run"
MAX_TEMPLATE_BYTES = 1 << 20
# What tokenizers cut differently: numbers, contractions, spaces and new lines, characters in several forms and scripts.
PROBES = (
    *("It's", "SHE'LL", "x 1234567890", "a   b", "x \n\n\t 'y", "cafe\u0301 \ufb01 \uff46", "\u4f60\u597d x1.\r\n "),
    "Don't  stop: NaïVE tests,\n\tx_1 = 1234567.89 * (y[0] + 2)\r\n 我们学习。 Да, ﬁne ｗｉｄｅ e\u0301 नमस्ते 🙂 </s>",
)
# Those before are all that runs of earlier versions noted.
MORE_PROBES = ("Steps:\n\n1. a  2\n\n2. b", "    2 + 2\t3", "| 1 | 22 |\n", "-- '' ... !!\n\n\nA")
# Options of a model of tokenizers' that decide which tokens it makes.
MERGING = (
    *("ignore_merges", "byte_fallback", "unk_token", "fuse_unk"),
    *("continuing_subword_prefix", "end_of_word_suffix"),
)
_TOLD: set[str] = set()  # fingerprints of tokenizers that were warned about
PROBED = 20_000  # tokens, whose own texts are tried too


def without_torch() -> None:
    """There is no PyTorch in this process from now on. transformers imports it where it finds it, which takes seconds
    and some 200 MB, and nothing here uses it. For processes that are jaxtune's alone."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def load_tokenizer(path: Path, template: str | None = None, noted: str | None = None) -> Any:
    """A transformers fast tokenizer, from a directory or a .gguf file.

    template: a file of a Jinja chat template that takes the place of the tokenizer's own. noted: the fingerprint of the
    one that a run began with.

    Raises:
        ModelError: there is none, it needs code of its own, its template is no text, or it has no end-of-sequence
            token.
    """
    if path.suffix == ".gguf":
        from jaxtune.gguf_tokenizer import read_gguf_tokenizer

        tokenizer = read_gguf_tokenizer(path)
    else:
        tokenizer = _from_directory(path, noted)
    if template is not None:
        tokenizer.chat_template = _read_template(expanded(template))
    if not _is_template(tokenizer.chat_template):
        where = "the tokenizer" if path.suffix == ".gguf" else "tokenizer_config.json"
        raise ModelError(
            f"{path}: chat_template of {where} is {tokenizer.chat_template!r:.200}; expected text, or a list of named "
            "ones; put it right, or set data.template"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path, **options: Any) -> None:
    """Write its files. options: save_pretrained's.

    Raises:
        OSError: they cannot be written; of a full disk the tokenizers library raises a bare Exception.
    """
    try:
        tokenizer.save_pretrained(directory, **options)
    except Exception as problem:
        if type(problem) is not Exception:
            raise
        raise OSError(f"{directory}: {problem}") from problem


def _from_directory(path: Path, noted: str | None) -> Any:
    """As its tokenizer.json says, where it has one.

    transformers 5 takes of that file the vocabulary and the merges alone where the tokenizer's class, or the model's
    type, has steps of its own before them: SmolLM2's numbers, or a Qwen2 model's other words, are cut otherwise then
    (its issues 45488 and 48206). Runs of earlier versions learnt that cut, and keep it.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer, file = load_as_transformers(path), path / "tokenizer.json"
    if not file.exists() or _steps(tokenizer.backend_tokenizer) == _steps_of(file):
        return tokenizer
    as_written = _load(path, PreTrainedTokenizerFast, padding_side=tokenizer.padding_side)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):  # which the class has where the files name none
        token = getattr(tokenizer, name)
        if getattr(as_written, name) is None and token in as_written.get_vocab():
            setattr(as_written, name, token)
    now, kind = tokenizer_print(as_written), type(tokenizer).__name__
    if noted is not None and noted != now and is_tokenizer_print(noted, tokenizer):
        warn(f"{path}: read as {kind}, as when the run began; by its tokenizer.json some text is cut otherwise")
        _TOLD.add(now)
        return tokenizer
    text = first_difference(as_written, tokenizer)
    if text is not None and now not in _TOLD and multiprocessing.parent_process() is None:
        _TOLD.add(now)
        warn(
            f"{path}: text is cut as tokenizer.json says; transformers {version('transformers')} reads it as {kind}, "
            f"which cuts some otherwise, such as {text!r:.60}"
        )
    return as_written


def load_as_transformers(path: Path) -> Any:
    """The fast tokenizer that transformers' AutoTokenizer makes of a directory, by the class that it has for it.

    Raises:
        ModelError: there is none, or it needs code of its own.
    """
    from transformers import AutoTokenizer

    if not (path / "tokenizer.json").exists() and not (path / "tokenizer_config.json").exists():
        raise ModelError(
            f"{path}: no tokenizer.json and no tokenizer_config.json; copy them there, or set model.tokenizer"
        )
    tokenizer = _load(path, AutoTokenizer, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ModelError(f"{path}: the tokenizer is in Python; {NEEDED}")
    return tokenizer


def _load(path: Path, kind: Any, **options: Any) -> Any:
    found, problem = _tried(kind, path, **options)
    if problem is None:
        return found
    from transformers import AutoConfig

    if (path / "config.json").exists() and problem == _tried(AutoConfig, path)[1]:
        raise ModelError(
            f"{path / 'config.json'}: transformers, which reads it for the tokenizer, does not take it ({problem}); "
            "put it right, or set model.tokenizer"
        )
    raise ModelError(f"{path}: the tokenizer cannot be loaded ({problem}); {NEEDED}")


def _tried(kind: Any, path: Path, **options: Any) -> tuple[Any, str | None]:
    """What is made of a directory, or what is wrong with it."""
    try:
        return kind.from_pretrained(str(path), local_files_only=True, **options), None
    except Exception as problem:  # the library raises many kinds, its Rust side bare Exceptions
        return None, " ".join(str(problem).split())[:500] or type(problem).__name__


def _steps(core: Tokenizer, model: dict[str, Any] | None = None) -> list[Any]:
    """What is done to a text before its pieces are merged to tokens, and how they are. model: core's, as it stands in
    a file."""
    before = (core.normalizer, core.pre_tokenizer)
    parts = [part and json.loads(part.__getstate__(), object_hook=_deciding) for part in before]
    if model is None:
        model = {"type": type(core.model).__name__} | {name: getattr(core.model, name, None) for name in MERGING}
    return [*parts, model.get("type", "BPE"), *(model.get(name) or None for name in MERGING)]


def cuts_alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers do the same to a text before its pieces are merged, whatever their vocabularies are."""
    return _steps(one.backend_tokenizer) == _steps(other.backend_tokenizer)


def _deciding(options: dict[str, Any]) -> dict[str, Any]:
    """Without what says where tokens stand, not which they are."""
    return {name: value for name, value in options.items() if name != "trim_offsets"}


def _steps_of(file: Path) -> list[Any]:
    """Those that a tokenizer.json asks for, in the library's form of today."""
    tree = read_json(file, ModelError)
    bare: dict[str, Any] = {
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "added_tokens": [],
        "post_processor": None,
    }
    return _steps(Tokenizer.from_str(json.dumps({**tree, **bare})), tree["model"])


def _is_template(found: Any) -> bool:
    """Whether it is a chat template, several under their names, or none."""
    return found is None or all(
        isinstance(one, str) for one in (found.values() if isinstance(found, dict) else [found])
    )


def _read_template(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ModelError(f"data.template {path}: larger than {MAX_TEMPLATE_BYTES} bytes")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:  # elsewhere templates have names: chatml, qwen
        raise ModelError(
            f"data.template {path}: no such file; it is the path of a file with a Jinja template, not a template's "
            "name: leave it out for the tokenizer's own"
        ) from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ModelError(f"data.template {path}: cannot be read: {problem}") from None


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Every token has a row in the embedding; rows without a token are padding and allowed.

    Raises:
        ModelError: in JAX an id past the end would be read as another row, without an error.
    """
    size = vocabulary_size(tokenizer)
    if size > vocab_size:
        names = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)[:4]
        raise ModelError(
            f"the tokenizer has ids up to {size - 1}, the model's embedding has {vocab_size} rows; without a row:"
            f" {', '.join(f'{token!r} ({i})' for i, token in names)}; use the model's own tokenizer"
        )


def first_difference(one: Any, other: Any) -> str | None:
    """A text that two tokenizers make different tokens of; None: there is none among many, each token's own among
    them."""
    mine, theirs = one.backend_tokenizer, other.backend_tokenizer
    if mine.to_str() == theirs.to_str():
        return None
    text = _first_of([*_probes(one), *other.get_added_vocab()], mine, theirs)
    if text is not None:
        return text
    ids = [[i] for i in range(min(vocabulary_size(one), PROBED))]
    return _first_of(mine.decode_batch(ids, skip_special_tokens=False), mine, theirs)


def _first_of(texts: list[str], one: Tokenizer, other: Tokenizer) -> str | None:
    """The first of which two make different tokens."""
    pairs = zip(texts, one.encode_batch(texts), other.encode_batch(texts), strict=True)
    return next((text for text, a, b in pairs if a.ids != b.ids), None)


def _probes(tokenizer: Any) -> list[str]:
    end = tokenizer.eos_token or ""  # behind which words begin otherwise in some
    return [*PROBES, *MORE_PROBES, f"a{end}\nb{end} c{end}d"]


def is_tokenizer_print(told: str, tokenizer: Any) -> bool:
    """Whether a fingerprint, by a rule of now or before, is this tokenizer's."""
    return told in (tokenizer_print(tokenizer), tokenizer_print(tokenizer, PROBES))


def tokenizer_print(tokenizer: Any, probes: Iterable[str] | None = None) -> str:
    """SHA-256 of what a tokenizer does: its vocabulary, how a sequence begins and ends, and the tokens of some texts.

    Of neither its files nor the library's form of them, which another version may write otherwise. The chat template
    does not count.
    """
    words = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    does = [
        words,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer(list(probes or _probes(tokenizer)))["input_ids"],
    ]
    return hashlib.sha256(json.dumps(does).encode()).hexdigest()


def tokenizer_of(path: Path) -> Any | None:
    """The tokenizer that lies with a model; None: there is none that can be loaded."""
    try:
        return load_tokenizer(path)
    except ModelError:
        return None


def shares_ids(tokenizer: Any, own: Any | None) -> bool:
    """Whether the token ids in a model's own files are this tokenizer's: it has all tokens of the one that lies with
    the model, and may have more."""
    return own is not None and own.get_vocab().items() <= tokenizer.get_vocab().items()


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """The special tokens that a model's config has, under their names there."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def pad_id(tokenizer: Any) -> int:
    """The id that fills up rows; it is masked everywhere, so any token does when the tokenizer has none for it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def stop_ids(tokenizer: Any, path: Path | None = None) -> tuple[int, ...]:
    """The ids that end a reply: the tokenizer's end, those of generation_config.json, the template's end of turn.

    path: the model's directory; a .gguf has no generation_config.
    """
    ids = {tokenizer.eos_token_id, *_generation_ids(path)}
    template = tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [template or ""]
    special = tokenizer.get_added_vocab()
    ids |= {special[token] for token in END_OF_TURN if token in special and any(token in text for text in texts)}
    return tuple(sorted(ids))


def token_ids(found: Any) -> list[Any]:
    """What Hugging Face's settings say of a special token, which may be an id, a list of them or nothing, as a list."""
    return found if isinstance(found, list) else [] if found is None else [found]


def _generation_ids(path: Path | None) -> list[int]:
    if path is None or not (path / "generation_config.json").exists():
        return []
    file = inside(path, "generation_config.json", ModelError, str(path))
    found = read_json(file, ModelError).get("eos_token_id")
    ids = token_ids(found)
    if not all(type(i) is int and 0 <= i <= LARGEST for i in ids):
        raise ModelError(f"{file}: eos_token_id is {found!r:.200}; expected a token id or a list of them")
    return ids
