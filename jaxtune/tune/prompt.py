"""Prompt tuning: the embeddings of the virtual tokens train, and nothing else does."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import model_validator

from jaxtune import ops
from jaxtune.errors import ConfigError
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import HOOKS, Tree, Weight, path_key
from jaxtune.ops import Noise
from jaxtune.tune.method import EMBEDDING, Method, ShardingOf, get_path, is_abstract, make
from jaxtune.tune.peft_files import Files
from jaxtune.tune.virtual import (
    EMBEDDINGS,
    HARMLESS,
    SETTINGS,
    Virtual,
    VirtualHooks,
    number_of_layers,
    own_entries,
    own_keys,
    put,
    read_virtual,
    write_virtual,
)

PROMPT = (HOOKS, "prompt")


class PromptSection(Virtual):
    """Embeddings that stand before every conversation (Lester et al. 2021, arXiv 2104.08691).

    A P-tuning adapter of PEFT's has no encoder, only what it gave: it loads as this method.
    """

    method: Literal["prompt"] = "prompt"
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"  # normal; random tokens'; a text's tokens'
    prompt_tuning_init_text: str | None = None  # repeated or cut to the number of virtual tokens

    @model_validator(mode="after")
    def _nothing_unused(self):
        is_text, text = self.prompt_tuning_init == "TEXT", self.prompt_tuning_init_text
        if is_text and not text:
            raise ValueError("prompt_tuning_init TEXT takes its text from prompt_tuning_init_text, which is not set")
        if text is not None and not is_text:
            raise ValueError("prompt_tuning_init_text belongs to prompt_tuning_init TEXT and would do nothing")
        if self.adapter is not None and self.prompt_tuning_init != "RANDOM":
            raise ValueError("prompt_tuning_init is how a new prompt starts and would do nothing with an adapter")
        return self


@dataclass(frozen=True)
class PromptHooks(VirtualHooks):
    """The embeddings as they are, [V, E]."""

    def shared(self, config: ModelConfig) -> Tree:
        return {PROMPT[1]: Weight((self.count, config.hidden_size), (None, "embed"), EMBEDDINGS)}

    def embedded(self, shared: Tree, slots_BT: jax.Array, dtype: Any, noise: Noise | None) -> jax.Array:
        return ops.embed(slots_BT, shared[PROMPT[1]], dtype)


def wrap(
    section: PromptSection, params: Tree, weights: Tree, seed: int, sharding_of: ShardingOf | None, tokenizer: Any
) -> Tree:
    """The parameters with the prompt as PEFT starts it: normal with deviation 1, or tokens' embeddings."""
    result = put(params, weights, {PROMPT[1]: None}, seed, sharding_of)
    if section.prompt_tuning_init == "RANDOM" or is_abstract(params):
        return result
    table = get_path(params, EMBEDDING)
    if section.prompt_tuning_init == "TEXT":
        ids = text_ids(section, tokenizer)
    else:
        vocab = get_path(weights, EMBEDDING).shape[0]
        ids = jax.random.randint(path_key(seed, EMBEDDINGS), (section.num_virtual_tokens,), 0, vocab)
    where = result[HOOKS][PROMPT[1]].sharding
    result[HOOKS][PROMPT[1]] = make(partial(ops.embed, dtype=jnp.float32), where, False, ids, table)
    return result


def text_ids(section: PromptSection, tokenizer: Any) -> jax.Array:
    """int32 [V]: the text's tokens, over and over."""
    ids = list(tokenizer(section.prompt_tuning_init_text)["input_ids"])
    if not ids:
        raise ConfigError("tune.prompt_tuning_init_text has no token; give it some text")
    count = section.num_virtual_tokens
    return jnp.array((ids * -(-count // len(ids)))[:count], jnp.int32)


def write(section: PromptSection, weights: Tree) -> dict[str, Any]:
    """How the prompt started is not written: PEFT would ask for a tokenizer, though it has the numbers."""
    (_, size), layers = get_path(weights, PROMPT).shape, number_of_layers(weights)
    return {**write_virtual(size, layers), "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}


def read(tree: dict[str, Any], where: FilePath) -> dict[str, Any]:
    return read_virtual(tree, where)


STARTS = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
ENCODER = {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
PROMPT_FILES = Files(
    "PROMPT_TUNING",
    SETTINGS,
    {},
    harmless=HARMLESS | STARTS | ENCODER,
    read=read,
    write=write,
    entries=own_entries,
    reads=frozenset({"P_TUNING"}),
)
PROMPT_TUNING = Method(
    PromptSection,
    trained=own_keys,
    wrap=wrap,
    needs_tokenizer=True,
    files=PROMPT_FILES,
    hooks=lambda section, config: PromptHooks(section.num_virtual_tokens),
)
