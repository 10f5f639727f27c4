"""The tokenizer in a .gguf file's fields, built with the tokenizers library.

Two kinds: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`). The names and meanings of the fields
are llama.cpp's; what is built equals the tokenizer of the model's Hugging Face directory.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxtune.errors import ModelError, listing, nearest
from jaxtune.gguf_file import read_gguf

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types
SPACE = "\u2581"  # what SentencePiece writes for a space


@dataclass(frozen=True)
class Split:
    """How a byte-level vocabulary cuts text before its merges."""

    pattern: str | None = None  # None: GPT-2's, which is ByteLevel's own
    single_digits: bool = False
    normal_form: bool = False  # NFC
    ignore_merges: bool = False  # a piece that is a token stays whole
    add_bos: bool = False  # where the file does not say


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = Split(rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}", normal_form=True)
LLAMA3 = Split(rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}", ignore_merges=True, add_bos=True)
SPLITS = {
    "default": Split(),
    "gpt-2": Split(),
    "gpt2": Split(),
    "smollm": Split(single_digits=True),
    "qwen2": QWEN2,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
}


def read_gguf_tokenizer(path: Path) -> Any:
    """A transformers tokenizer with the file's special tokens and chat template.

    Raises:
        ModelError: a kind of tokenizer that is not supported, or fields that do not fit together.
    """
    file = read_gguf(path)
    fields = _Fields(path, file.fields)
    kind = fields.get("model", str)
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        fields.refuse("model", f"supported: {listing(makers)}")
    core, add_bos = makers[kind](fields)
    core.add_special_tokens([_added(token) for token in fields.of_type(CONTROL)])
    core.add_tokens([_added(token) for token in fields.of_type(USER_DEFINED)])
    return _wrap(core, fields, fields.get("add_bos_token", bool, add_bos))


class _Fields:
    """The tokenizer's fields, typed."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values
        self.tokens = self.get("tokens", list)
        self.types = self.get("token_type", list, [])
        if self.types and len(self.types) != len(self.tokens):
            self.refuse("token_type", f"expected one for each of {len(self.tokens)} tokens", len(self.types))

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        value = self.values.get(f"tokenizer.ggml.{name}", default)
        if value is not default and type(value) is not kind:
            self.refuse(name, f"expected a {kind.__name__}")
        if value is ...:
            raise ModelError(f"{self.path}: no tokenizer.ggml.{name}; set model.tokenizer to the model's own tokenizer")
        return value

    def refuse(self, name: str, why: str, found: Any = None):
        found = self.values[f"tokenizer.ggml.{name}"] if found is None else found
        raise ModelError(
            f"{self.path}: tokenizer.ggml.{name} is {found!r:.100}; {why}; or set model.tokenizer to the model's own"
        )

    def of_type(self, kind: int) -> list[str]:
        return [token for token, its in zip(self.tokens, self.types) if its == kind]

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, without the rows that only fill up the embedding."""
        types = self.types or [1] * len(self.tokens)
        filler = [kind == UNUSED and token == f"[PAD{i}]" for i, (token, kind) in enumerate(zip(self.tokens, types))]
        return {token: i for i, token in enumerate(self.tokens) if not filler[i]}

    def special(self, name: str) -> str | None:
        """The token of a role such as `eos`."""
        i = self.get(f"{name}_token_id", int, None)
        if i is None:
            return None
        if not 0 <= i < len(self.tokens):
            self.refuse(f"{name}_token_id", f"expected an id below {len(self.tokens)}")
        return self.tokens[i]

    def merges(self) -> list[tuple[str, str]]:
        pairs = [tuple(merge.split(" ")) for merge in self.get("merges", list)]
        if not all(len(pair) == 2 for pair in pairs):
            self.refuse("merges", "expected two tokens with a space between in each")
        return pairs


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=False)


def _byte_level(fields: _Fields) -> tuple[Tokenizer, bool]:
    name = fields.get("pre", str)
    if name not in SPLITS:
        fields.refuse("pre", f"supported: {listing(SPLITS, 20)}{nearest(name, SPLITS)}")
    split = SPLITS[name]
    core = Tokenizer(_bpe(fields, fields.merges(), ignore_merges=split.ignore_merges))
    if split.normal_form:
        core.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    return core, split.add_bos


def _sentencepiece(fields: _Fields) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE: its merges follow from the scores, unknown characters fall back to bytes."""
    unknown = fields.special("unknown") or fields.tokens[0]
    core = Tokenizer(_bpe(fields, _implied_merges(fields), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.get("add_space_prefix", bool, True)
    core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first" if prefix else "never", split=False)
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return core, True


def _bpe(fields: _Fields, merges: list[tuple[str, str]], **settings: Any) -> models.BPE:
    try:
        return models.BPE(vocab=fields.vocabulary(), merges=merges, **settings)
    except Exception as problem:  # the library's Rust side raises bare Exceptions
        raise ModelError(f"{fields.path}: the tokenizer's tokens and merges do not fit: {problem}") from None


def _implied_merges(fields: _Fields) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the token with the best score first, its longest left part first."""
    if "tokenizer.ggml.merges" in fields.values:
        return fields.merges()
    vocabulary, scores = fields.vocabulary(), fields.get("scores", list)
    if len(scores) != len(fields.tokens):
        fields.refuse("scores", f"expected one for each of {len(fields.tokens)} tokens", len(scores))
    ranked = []
    for token, i in vocabulary.items():
        for cut in range(1, len(token)):
            if token[:cut] in vocabulary and token[cut:] in vocabulary:
                ranked.append((-scores[i], -cut, i, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _wrap(core: Tokenizer, fields: _Fields, add_bos: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    names = {role: token for role, name in roles.items() if (token := fields.special(name)) is not None}
    _add_ends(core, names, add_bos, fields.get("add_eos_token", bool, False))
    template = fields.values.get("tokenizer.chat_template")
    length = fields.values.get(f"{fields.values.get('general.architecture')}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=template,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        **names,
    )


def _add_ends(core: Tokenizer, names: dict[str, str], add_bos: bool, add_eos: bool) -> None:
    """Text that is encoded with special tokens gets those that the model was trained with."""
    first = [names["bos_token"]] if add_bos and "bos_token" in names else []
    last = [names["eos_token"]] if add_eos and "eos_token" in names else []
    if not first and not last:
        core.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    ids = [(token, core.token_to_id(token)) for token in {*first, *last}]
    both = [*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)]
    core.post_processor = processors.TemplateProcessing(
        single=" ".join([*first, "$A", *last]), pair=" ".join(both), special_tokens=ids
    )
