"""Trainable tokens: of the embedding, and of the head where that is asked for, only the rows of some tokens train.

Tokens that the tokenizer does not have can be added to it; the tables then grow as far as they must.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import PrivateAttr

from jaxtune import ops
from jaxtune.errors import AdapterError, ConfigError, ModelError, listing
from jaxtune.files import expanded
from jaxtune.leaves import Axes, Leaf
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import Path as WeightPath
from jaxtune.models.weights import Tree, Weight, map_tree, set_path
from jaxtune.parallel import local
from jaxtune.section import Adapting, NonNegative
from jaxtune.tokenizer import load_tokenizer, vocabulary_size
from jaxtune.tune import names
from jaxtune.tune.method import EMBEDDING, HEAD, Method, ShardingOf, get_path, is_abstract, make
from jaxtune.tune.peft_files import PREFIX, Entry, Files

TABLES = {"embed_tokens": EMBEDDING, "lm_head": HEAD}
FULL_NAMES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
DELTA = ".trainable_tokens_delta"


class TokensSection(Adapting):
    """The rows of some tokens train, and nothing else (PEFT's trainable tokens). A head tied to the embedding has the
    same rows."""

    method: Literal["trainable_tokens"] = "trainable_tokens"
    token_indices: list[NonNegative] = []  # ids of tokens that the tokenizer has
    new_tokens: list[str] = []  # added to the tokenizer; their rows start as the mean of the others
    targets: list[Literal["embed_tokens", "lm_head"]] | None = None  # null: embed_tokens; with new tokens lm_head too

    _new_ids: tuple[int, ...] | None = PrivateAttr(None)  # of new_tokens; None: no tokenizer was asked yet

    def ids(self, vocab_size: int) -> tuple[int, ...]:
        """All that train. vocab_size: of the grown tables, at whose end new tokens lie if no tokenizer was asked."""
        new = self._new_ids
        return *self.token_indices, *(range(vocab_size - len(self.new_tokens), vocab_size) if new is None else new)

    def known(self, vocab_size: int) -> int:
        """How many rows there are before the first new one."""
        new = self.ids(vocab_size)[len(self.token_indices) :]
        return min(new, default=vocab_size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRows(Leaf):
    """A table of which some rows are replaced.

    base: [vocab, E]; rows: [n, E]. ids: the rows' numbers; size: of the whole vocabulary, which may be split over the
    tensor axis.
    """

    TRAINS: ClassVar[frozenset[str]] = frozenset({"rows_NE"})

    base: Any
    rows_NE: jax.Array
    ids: tuple[int, ...] = field(metadata={"static": True})
    size: int = field(metadata={"static": True})

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        return {"rows_NE": (None, axes[-1])}

    def _own(self) -> tuple[int, jax.Array]:
        """(rows of the base on this device, the replaced rows' numbers there: outside of it where another has them)."""
        count = self.size // local.size("tensor")
        return count, jnp.array(self.ids, jnp.int32) - local.index("tensor") * count

    def rows(self, ids: Any, dtype: Any) -> Any:
        count, own_N = self._own()
        same = (ids[..., None] == own_N) & (own_N >= 0) & (own_N < count)
        replaced = self.rows_NE.astype(dtype)[jnp.argmax(same, axis=-1)]
        return jnp.where(same.any(axis=-1, keepdims=True), replaced, ops.embed(ids, self.base, dtype))

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        (x,) = inputs
        count, own_N = self._own()
        columns = jnp.where((own_N >= 0) & (own_N < count), own_N, count)  # past the end: dropped
        return ops.linear(x, self.base).at[..., columns].set(ops.linear(x, self.rows_NE), mode="drop")

    def dense(self, is_table: bool) -> Any:
        return ops.dense(self.base, is_table).at[jnp.array(self.ids)].set(self.rows_NE)


def add_words(section: TokensSection, tokenizer: Any) -> tuple[Any, TokensSection]:
    """(the tokenizer with the new tokens, the section with their ids).

    An adapter that has ids which the tokenizer lacks has a tokenizer of its own beside it.

    Raises:
        ConfigError: a new token is not new, or no text.
        ModelError: the ids have holes, and the tokenizers library counts on from the number of tokens.
    """
    if section.adapter is not None:
        return _of_adapter(section, tokenizer)
    taken = [token for token in section.new_tokens if token in tokenizer.get_vocab()]
    if taken:
        ids = ", ".join(str(tokenizer.get_vocab()[token]) for token in taken)
        raise ConfigError(
            f"tune.new_tokens: the tokenizer has {listing(taken)} already; name what is new there, and the ids of "
            f"others ({ids}) in tune.token_indices"
        )
    if len(set(section.new_tokens)) < len(section.new_tokens) or "" in section.new_tokens:
        raise ConfigError("tune.new_tokens: a token is empty or there twice")
    largest, known = vocabulary_size(tokenizer) - 1, len(tokenizer)
    if section.new_tokens:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in section.new_tokens])
    section = section.model_copy()
    section._new_ids = tuple(tokenizer.convert_tokens_to_ids(section.new_tokens))
    first = min(section._new_ids, default=largest + 1)
    if first <= largest:
        raise ModelError(
            f"tune.new_tokens: the tokenizer of {tokenizer.name_or_path} has {known} tokens, with ids up to {largest}: "
            f"new ones would get ids from {first} on, which others have; give each id up to {largest} a token in its "
            "tokenizer.json, or train tokens that it has: tune.token_indices"
        )
    return tokenizer, section


def _of_adapter(section: TokensSection, tokenizer: Any) -> tuple[Any, TokensSection]:
    directory = expanded(section.adapter or "")
    if max(section.token_indices) >= vocabulary_size(tokenizer) and (directory / "tokenizer.json").is_file():
        template, tokenizer = tokenizer.chat_template, load_tokenizer(directory)
        tokenizer.chat_template = template
    unknown = [token for token in section.new_tokens if token not in tokenizer.get_vocab()]
    if unknown:
        raise ConfigError(f"tune.new_tokens: {listing(unknown)} is not among the tokens of tune.adapter {directory}")
    return tokenizer, section.model_copy(update={"new_tokens": []})


def grown(section: TokensSection, config: ModelConfig) -> int:
    """The rows that the tables need: rows without a token, which many models have, are used first.

    Raises:
        ConfigError: no token is named, one is twice, or one is past the vocabulary and not new.
    """
    old = section.token_indices
    if not old and not section.new_tokens:
        raise ConfigError("tune.method trainable_tokens: name some in tune.token_indices or tune.new_tokens")
    past = [str(number) for number in old if number >= config.vocab_size]
    if past and section.adapter is None:
        raise ConfigError(
            f"tune.token_indices: {listing(past)} is past the model's vocabulary, 0 to {config.vocab_size - 1}; "
            "to add tokens, name their texts in tune.new_tokens"
        )
    if len(set(old)) < len(old):
        raise ConfigError("tune.token_indices: an id is there twice")
    if section._new_ids is None and section.new_tokens:
        return config.vocab_size + len(section.new_tokens)
    return max(config.vocab_size, max(section.ids(0)) + 1)


def tables(section: TokensSection, weights: Tree) -> dict[str, WeightPath]:
    """Name -> path of the tables whose rows train."""
    has_head = get_path(weights, HEAD) is not None
    targets = section.targets
    if targets is None:
        targets = ["embed_tokens", "lm_head"] if section.new_tokens and has_head else ["embed_tokens"]
    if not targets:
        raise ConfigError(f"tune.targets is empty; allowed are {listing(TABLES)}")
    if "lm_head" in targets and not has_head:
        if section.adapter is None:
            raise ConfigError("tune.targets: the model's lm_head is its embedding; name embed_tokens alone")
        targets = ["embed_tokens"]  # PEFT lets the head follow the embedding then
    return {name: TABLES[name] for name in TABLES if name in targets}


def adapted(section: TokensSection, weights: Tree) -> set[str]:
    return {get_path(weights, path).key for path in tables(section, weights).values()}


def wrap(section: TokensSection, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None) -> Tree:
    """The tables grown to their declared sizes, and the leaves on those whose rows train."""
    size = get_path(weights, EMBEDDING).shape[0]
    ids, known = section.ids(size), section.known(size)
    result = map_tree(lambda leaf: leaf, params)
    for path in (EMBEDDING, HEAD):
        weight: Weight | None = get_path(weights, path)
        if weight is None:
            continue
        base = _grown(get_path(params, path), weight, known, sharding_of)
        if path in tables(section, weights).values():
            place = None if sharding_of is None else sharding_of((len(ids), weight.shape[1]), (None, weight.axes[1]))
            rows = make(_start, place, is_abstract({"base": base}), base, ids=ids, known=known)
            base = TokenRows(base, rows, ids, size)
        set_path(result, path, base)
    return result


def _grown(base: Any, weight: Weight, known: int, sharding_of: ShardingOf | None) -> Any:
    if isinstance(base, Leaf) or base.shape == weight.shape:
        return base
    place = None if sharding_of is None else sharding_of(weight.full_shape, weight.full_axes)
    return make(_longer, place, is_abstract({"base": base}), base, rows=weight.shape[0], known=known)


def _longer(base: jax.Array, *, rows: int, known: int) -> jax.Array:
    more = jnp.broadcast_to(_mean(base, known).astype(base.dtype), (rows - base.shape[0], base.shape[1]))
    return jnp.concatenate([base, more])


def _start(base: Any, *, ids: tuple[int, ...], known: int) -> jax.Array:
    """The rows as they are; those of new tokens, at the end, the mean of the others: then every old token keeps most
    of its probability (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
    rows = ops.embed(jnp.array(ids), base, jnp.float32)
    is_new = jnp.array(ids) >= known
    return jnp.where(is_new[:, None], _mean(ops.dense(base, is_table=True), known), rows)


def _mean(base: jax.Array, known: int) -> jax.Array:
    return jnp.mean(base[:known].astype(jnp.float32), axis=0)


def entries(section: TokensSection, weights: Tree) -> list[Entry]:
    size, width = get_path(weights, EMBEDDING).shape
    shape = (len(section.ids(size)), width)
    named = tables(section, weights)
    return [Entry(f"{PREFIX}{FULL_NAMES[name]}{DELTA}", shape, path, None, "rows_NE") for name, path in named.items()]


def read(tree: dict[str, Any], where: Path) -> dict[str, Any]:
    listed = tree.get("target_modules") or []
    targets = [name for name in TABLES if names.is_named(FULL_NAMES[name], listed)]
    if not targets:
        raise AdapterError(f"{where}: target_modules {listed!r} names neither embed_tokens nor lm_head")
    if not tree.get("token_indices"):
        raise AdapterError(f"{where}: token_indices is empty")
    return {"targets": targets}


def write(section: TokensSection, weights: Tree) -> dict[str, Any]:
    ids = section.ids(get_path(weights, EMBEDDING).shape[0])
    return {"init_weights": True, "target_modules": list(tables(section, weights)), "token_indices": list(ids)}


def follows_embedding(key: str) -> str:
    """PEFT stores the rows a second time under the name of a tied head."""
    return key.replace(f"{PREFIX}lm_head{DELTA}", f"{PREFIX}{FULL_NAMES['embed_tokens']}{DELTA}")


# Source of the keys: peft 0.21, `TrainableTokensConfig`; of the tensors: files that it writes.
FILES = Files(
    "TRAINABLE_TOKENS",
    {"token_indices": "token_indices", "target_modules": "targets"},
    {},
    harmless=frozenset({"init_weights"}),
    read=read,
    write=write,
    entries=entries,
    alias=follows_embedding,
)
TRAINABLE_TOKENS = Method(
    TokensSection,
    trained=lambda section, weights: set(),
    adapted=adapted,
    wrap=wrap,
    files=FILES,
    words=add_words,
    vocab_size=grown,
)
