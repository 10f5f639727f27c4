"""The Python calls, for notebooks and scripts: `jaxtune.load_model` and `jaxtune.train`.

They do what the commands do, with the same parts; nothing is decided here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxtune.assemble import Assembled, adapted
from jaxtune.config import Config, load_config, make_config
from jaxtune.cpu_bfloat16 import compiler_options
from jaxtune.errors import AdapterError, ConfigError, DataError, ModelError, listing
from jaxtune.generate import Generator, bucket
from jaxtune.kept import compiled_anew
from jaxtune.loading import Opened, open_model
from jaxtune.mesh import batch_shards
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import Tree
from jaxtune.parallel import local
from jaxtune.parallel.layout import partitions
from jaxtune.sampling import Sampling
from jaxtune.text import Messages, decode, encode_prompt, text_pieces
from jaxtune.tune.peft_config import read_config

Prompt = str | Messages


@dataclass(frozen=True)
class _Programs:
    """A model under one adapter, or under none, and what was compiled for it."""

    assembled: Assembled
    generator: Generator
    logits: Any


class LoadedModel:
    """A model with its parameters, ready to be asked. `load_model` makes one.

    params: the parameter tree; on one CPU device large layers lie apart, else those that are alike lie in one stack.
    config: the model's settings. tokenizer: of transformers' kind. All three are of the adapter in use, since one with
    tokens of its own brings them along. system: put before messages that have no system message; of a run, the one
    that all its sources of conversations had, else None.
    """

    def __init__(self, opened: Opened):
        assembled = opened.assembled
        self.system, self.step, self.mesh = opened.system, opened.step, assembled.mesh
        self._dtype, self._opened = opened.dtype, opened
        self._loaded: dict[str | None, _Programs] = {}
        self._take(None, assembled)

    def _take(self, name: str | None, assembled: Assembled) -> None:
        """Answer with this model from now on."""
        self.params: Tree = assembled.params
        self.tokenizer: Any = assembled.source.tokenizer
        self.config: ModelConfig = assembled.model.config
        self._model, self._active = assembled.model, name
        if name not in self._loaded:
            generator = Generator(assembled.model, assembled.mesh, self._dtype, assembled.source.stop_ids)
            options = compiler_options(self._dtype, assembled.mesh.devices.flat[0])
            logits = jax.jit(self._everywhere(self._all_logits), compiler_options=options)
            self._loaded[name] = _Programs(assembled, generator, logits)
        self._generator, self._logits = self._loaded[name].generator, self._loaded[name].logits

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that `add_adapter` loaded."""
        return [name for name in self._loaded if name is not None]

    def add_adapter(self, name: str, directory: str | Path) -> None:
        """Load a PEFT adapter beside others; `use_adapter` puts it on. The base weights are there once.

        Raises:
            AdapterError: not an adapter of this model, the name is taken, or the model has an adapter of its own.
        """
        base = self._loaded[None].assembled
        if self._opened.section.method != "full":
            raise AdapterError("this model has an adapter already; load its base model, and add all adapters to it")
        if not name or name in self._loaded:
            taken = listing(self.adapters) or "none"
            raise AdapterError(f"adapter {name!r}: give a name that is not taken; taken are {taken}")
        active = self._active
        self._take(name, adapted(base, read_config(Path(directory))))
        self.use_adapter(active)

    def use_adapter(self, name: str | None) -> None:
        """Answer with this adapter on; None: with the base model alone.

        Raises:
            AdapterError: no adapter of that name was added.
        """
        if name not in self._loaded:
            raise AdapterError(f"adapter {name!r}: not loaded; loaded are {listing(self.adapters) or 'none'}")
        self._take(name, self._loaded[name].assembled)

    def logits(self, token_ids: Any) -> np.ndarray:
        """What the model expects after each token: [batch, time] of ids -> [batch, time, vocab] in float32.

        A model that was loaded in float32 computes in float32 throughout, also where the device would round the
        factors of a product to fewer bits.

        Raises:
            DataError: not [batch, time] of whole numbers, an id outside the vocabulary, or more than the
                model's positions.
        """
        ids = self._checked(token_ids)
        shards, virtual = batch_shards(self.mesh), self._model.virtual_ids
        end = len(virtual) + ids.shape[1]
        rows, time = -(-ids.shape[0] // shards) * shards, bucket(end)
        tokens, segments = np.zeros((2, rows, time), np.int32)
        tokens[: ids.shape[0], : len(virtual)] = virtual
        tokens[: ids.shape[0], len(virtual) : end] = ids
        segments[: ids.shape[0], :end] = 1
        precision = "highest" if self._dtype == np.float32 else None
        with jax.default_matmul_precision(precision), compiled_anew(self.mesh):
            logits = self._logits(self.params, tokens, segments)
        return np.asarray(logits)[: ids.shape[0], len(virtual) : end]

    def generate(
        self,
        prompt: Prompt | list[str] | list[Messages],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stream: bool = False,
    ) -> Any:
        """The model's answer: the new text alone.

        prompt: a text, which is continued as it is; or messages ({"role": "user", "content": "..."}), which go
        through the chat template; or a list of either, which are answered together and give a list.
        temperature: 0 takes the likeliest token each time; above that, `seed` decides. stream: give an iterator
        of pieces of the text as they come, never splitting a character.

        Raises:
            UserError: a setting, the messages or the prompt's length is wrong.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        prompts, is_batch = _as_batch(prompt)
        ids = [encode_prompt(self.tokenizer, one, self.system) for one in prompts]
        if stream:
            if is_batch:
                raise ConfigError("stream gives the text of one prompt; found a list of them")
            return self._stream(ids, max_new_tokens, sampling)
        rows = self._generator.tokens(self.params, ids, max_new_tokens, sampling)
        texts = [decode(self.tokenizer, row) for row in rows]
        return texts if is_batch else texts[0]

    def _stream(self, ids: list[list[int]], max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        pieces = self._generator.stream(self.params, ids, max_new_tokens, sampling)
        return text_pieces(self.tokenizer, (rows[0] for rows in pieces))

    def _checked(self, token_ids: Any) -> np.ndarray:
        try:
            ids = np.asarray(token_ids)
        except ValueError:
            raise DataError("token_ids: expected whole numbers [batch, time]; the rows have other lengths") from None
        if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"token_ids: expected whole numbers [batch, time]; found {ids.dtype} {list(ids.shape)}")
        outside = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if outside.size:
            raise DataError(f"token_ids: {outside[0]} is outside the vocabulary, 0 to {self.config.vocab_size - 1}")
        positions = self.config.max_positions - len(self._model.virtual_ids)
        if ids.shape[1] > positions and self.config.rope.type != "dynamic":
            raise ModelError(f"token_ids: {ids.shape[1]} tokens; the model has {positions} positions for them")
        return ids.astype(np.int32)

    def _everywhere(self, function: Any) -> Any:
        """`function(params, tokens, segments)` of each device's parts, rows and all."""
        rows = PartitionSpec(local.ROWS)
        where = partitions(self.mesh, self.config, self._model.weights, self.params)
        return local.run(function, self.mesh, (where, rows, rows), rows)

    def _all_logits(self, params: Tree, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        positions = jax.numpy.arange(tokens.shape[1]) * segments
        hidden, _ = self._model.hidden(params, tokens, positions, segments, self._dtype)
        return self._model.logits(params, hidden)


def load_model(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    mesh: Any = None,
) -> LoadedModel:
    """A model, from a Hugging Face directory, a .gguf file, a hub id, an export, or a run directory of jaxtune.

    adapter: a PEFT directory to put on it. dtype: float32 | bfloat16 | auto, of the weights and the computation.
    mesh: None, one device; sizes of its axes, such as {"fsdp": 8}; or a jax Mesh with axes of data, fsdp, tensor.
    A run that has not finished gives the model of its last valid checkpoint, and says so.

    Raises:
        UserError: of the kind that fits; the message names what is wrong.
    """
    return LoadedModel(open_model(path, adapter, dtype, mesh))


def train(config: Config | dict | str | Path) -> list[dict]:
    """Train as `jaxtune train` does, and give the rows of the run's metrics.jsonl.

    config: a Config, its sections as a dict, in which paths may be Paths, or the path of a YAML file. A run that was
    stopped goes on; one that has finished gives its rows again.

    Raises:
        UserError: of the kind that fits; the message names what is wrong.
        SystemExit: 143 or 130, when SIGTERM or Ctrl-C stopped the run after a save.
    """
    if isinstance(config, str | Path):
        config = load_config(config)
    elif isinstance(config, dict):
        config = make_config(config)
    elif not isinstance(config, Config):
        raise ConfigError(f"train: expected a Config, a dict of its sections, or a YAML file; found {config!r:.80}")
    from jaxtune import loop

    return loop.train(config)


def _as_batch(prompt: Any) -> tuple[list, bool]:
    """(prompts, whether a list of them was given)."""
    if isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt):
        return prompt, True
    return [prompt], False
