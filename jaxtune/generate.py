"""Generation with a key/value cache: one compiled prefill, then one compiled loop that draws a token at a time.

Works on token ids; words are text.py's, drawing a token is sampling.py's.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxtune.console import warn
from jaxtune.cpu_bfloat16 import compiler_options
from jaxtune.errors import ConfigError, ModelError
from jaxtune.kept import compiled_anew
from jaxtune.mesh import batch_shards
from jaxtune.models.decoder import Cache, Model
from jaxtune.models.weights import Tree
from jaxtune.parallel import local
from jaxtune.parallel.layout import partitions
from jaxtune.sampling import GREEDY, Knobs, Sampling, check, draw

SMALLEST_BUCKET = 64
CHUNK = 32  # tokens drawn before the host looks at them, when nobody watches; Ctrl-C waits for as many
# Partitions: of rows, of drawn tokens [steps, rows], of keys and values, and of what is alike everywhere.
ROWS, COLUMNS = PartitionSpec(local.ROWS), PartitionSpec(None, local.ROWS)
CACHE, WHOLE = PartitionSpec(None, local.ROWS, None, "tensor"), PartitionSpec()


def bucket(length: int) -> int:
    """`length` rounded up to 64, 96, 128, 192, 256, 384, ...: few programs, and at most a third of it padding."""
    size = SMALLEST_BUCKET
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def left_padded(prompts: Sequence[Sequence[int]], rows: int, time: int) -> dict[str, np.ndarray]:
    """tokens, positions and segments, each [rows, time] int32, with the prompts at the right end.

    Padding, whole rows of it too, is segment 0; a prompt's positions start at its first token.
    """
    names = ("tokens", "positions", "segments")
    arrays: dict[str, np.ndarray] = {name: np.zeros((rows, time), np.int32) for name in names}
    for row, prompt in enumerate(prompts):
        start = time - len(prompt)
        arrays["tokens"][row, start:] = prompt
        arrays["positions"][row, start:] = np.arange(len(prompt))
        arrays["segments"][row, start:] = 1
    return arrays


class Generator:
    """The compiled programs that draw tokens from one model. Parameters are given at each call, so that a model
    in training can be asked without compiling again."""

    def __init__(self, model: Model, mesh: Mesh, dtype: Any, stop: tuple[int, ...]):
        """dtype: of the computation and the cache. stop: token ids that end a row."""
        self.model, self.mesh, self.dtype, self.stop = model, mesh, jnp.dtype(dtype), stop
        jit = partial(jax.jit, compiler_options=compiler_options(self.dtype, mesh.devices.flat[0]))
        self._prefill = jit(self._first, static_argnames=("columns", "kind"))
        self._decode = jit(self._more, static_argnames="kind", donate_argnames="state")

    def stream(
        self,
        params: Tree,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        chunk: int = 1,
    ) -> Iterator[list[list[int]]]:
        """New tokens of each prompt as they come, at most `chunk` at a time; the stop token is not among them.

        A row ends at a stop token, after `max_new_tokens`, or where the model's positions end, which is said.
        chunk: 1 to CHUNK; more at a time means fewer waits for the device.

        Raises:
            ConfigError, ModelError: an empty prompt, one longer than the model's positions, no token asked for.
        """
        rooms = self._rooms(prompts, max_new_tokens)
        return self._stream(params, prompts, rooms, sampling, chunk, max_new_tokens)

    def tokens(
        self, params: Tree, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[list[int]]:
        """The new tokens of each prompt, all at once."""
        result: list[list[int]] = [[] for _ in prompts]
        for pieces in self.stream(params, prompts, max_new_tokens, sampling, CHUNK):
            for row, piece in zip(result, pieces):
                row.extend(piece)
        return result

    def _rooms(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
        """How many tokens each row may draw."""
        check("max_new_tokens", max_new_tokens, Integral, "1 or more", lambda value: value >= 1)
        c = self.model.config
        # Dynamic scaling goes beyond the positions that the model was trained with; that is its purpose.
        positions = int(c.max_positions * c.rope.factor) if c.rope.type == "dynamic" else c.max_positions
        positions -= len(self.model.virtual_ids)
        for prompt in prompts:
            if not prompt:
                raise ConfigError("the prompt has no token; give it some text")
            if len(prompt) >= positions:
                raise ModelError(
                    f"the prompt has {len(prompt)} tokens; the model has {positions} positions, for the prompt and "
                    "the answer together: shorten it"
                )
        return [min(max_new_tokens, positions - len(prompt)) for prompt in prompts]

    def _stream(self, params, prompts, rooms, sampling, chunk, asked) -> Iterator[list[list[int]]]:
        shards = batch_shards(self.mesh)
        rows = -(-len(prompts) // shards) * shards
        preceded = [[*self.model.virtual_ids, *prompt] for prompt in prompts]
        time = bucket(max(map(len, preceded)))
        inputs = left_padded(preceded, rows, time)
        left = np.array([*rooms, *[0] * (rows - len(prompts))], np.int32)
        # No token is -1: on a mesh the compiler of jax 0.11 ends the process at an array of nothing.
        knobs = {**sampling.knobs, "stop": np.array(self.stop or (-1,), np.int32)}
        columns = bucket(time + max(rooms))
        with compiled_anew(self.mesh):
            state, drawn = self._prefill(params, inputs, left, knobs, columns=columns, kind=sampling.kind)
        counts = [0] * len(prompts)
        ended = [False] * len(prompts)
        while True:
            yield self._new_tokens(np.asarray(drawn), rooms, counts, ended)
            if all(ended):
                break
            steps = np.int32(chunk)
            with compiled_anew(self.mesh):
                state, drawn = self._decode(params, state=state, steps=steps, knobs=knobs, kind=sampling.kind)
        cut = [len(p) for p, room, count in zip(prompts, rooms, counts) if count == room < asked]
        if cut:
            warn(f"the answer to a prompt of {max(cut)} tokens was cut where the model's positions end")

    def _new_tokens(self, drawn: np.ndarray, rooms: list[int], counts: list[int], ended: list[bool]) -> list[list[int]]:
        """The tokens in `drawn` [steps, rows] that belong to each row's answer; updates `counts` and `ended`."""
        result: list[list[int]] = [[] for _ in rooms]
        for row, room in enumerate(rooms):
            for token in drawn[:, row].tolist():
                if ended[row] or token < 0:
                    break
                if token in self.stop:
                    ended[row] = True
                else:
                    result[row].append(token)
                    counts[row] += 1
                    ended[row] = counts[row] == room
        return result

    def _first(self, params, inputs, left, knobs: Knobs, columns: int, kind: str):
        """Prefill: the loop's state after the first drawn token, and that token as [1, rows]."""

        def first(params, inputs, left, knobs):
            empty = self.model.empty_cache(left.shape[0], columns, self.dtype)
            tokens, positions, segments = (inputs[name] for name in ("tokens", "positions", "segments"))
            hidden, cache = self.model.hidden(params, tokens, positions, segments, self.dtype, cache=empty)
            token = self._draw(params, hidden[:, -1], knobs, kind, jnp.int32(0))
            state = {
                "cache": cache,
                "token": token,
                "position": positions[:, -1] + 1,
                "left": _left(left, token, knobs),
                "count": jnp.int32(1),
            }
            return state, token[None]

        specs = self._specs(params), ROWS, ROWS, WHOLE
        return local.run(first, self.mesh, specs, (self._state_specs(), COLUMNS))(params, inputs, left, knobs)

    def _more(self, params, state, steps, knobs: Knobs, kind: str):
        """Up to `steps` tokens more, fewer when every row has ended: the state, and [CHUNK, rows] with -1 below."""

        def more(params, state, steps, knobs):
            drawn = jnp.full((CHUNK, state["token"].shape[0]), -1, jnp.int32)

            def body(carry):
                index, state, drawn, _ = carry
                state = self._one(params, state, knobs, kind)
                return index + 1, state, drawn.at[index].set(state["token"]), _any_left(state)

            first = jnp.int32(0), state, drawn, _any_left(state)
            _, state, drawn, _ = jax.lax.while_loop(lambda carry: (carry[0] < steps) & carry[3], body, first)
            return state, drawn

        states = self._state_specs()
        specs = self._specs(params), states, WHOLE, WHOLE
        return local.run(more, self.mesh, specs, (states, COLUMNS))(params, state, steps, knobs)

    def _one(self, params, state, knobs: Knobs, kind: str):
        segments = jnp.ones_like(state["token"])[:, None]
        inputs = state["token"][:, None], state["position"][:, None], segments
        hidden, cache = self.model.hidden(params, *inputs, self.dtype, cache=state["cache"])
        token = self._draw(params, hidden[:, 0], knobs, kind, state["count"])
        return {
            "cache": cache,
            "token": token,
            "position": state["position"] + 1,
            "left": _left(state["left"], token, knobs),
            "count": state["count"] + 1,
        }

    def _draw(self, params, hidden, knobs: Knobs, kind: str, count) -> jax.Array:
        data, fsdp = local.ROWS
        first_row = (local.index(data) * local.size(fsdp) + local.index(fsdp)) * hidden.shape[0]
        return draw(self.model.logits(params, hidden), knobs, kind, count, first_row)

    def _specs(self, params: Tree) -> Tree:
        return partitions(self.mesh, self.model.config, self.model.weights, params)

    def _state_specs(self) -> Tree:
        """The partition of the loop's state: of each device's rows and, in the cache, its heads."""
        arrays = (CACHE,) * len(self.model.stacks)
        rows = dict.fromkeys(("token", "position", "left"), ROWS)
        return {"cache": Cache(arrays, arrays, ROWS, WHOLE), "count": WHOLE, **rows}


def _any_left(state: Tree) -> jax.Array:
    """Whether any row, on any device, may still draw."""
    return local.largest(jnp.any(state["left"] > 0).astype(jnp.int32), *local.ROWS) > 0


def _left(left: jax.Array, token: jax.Array, knobs: Knobs) -> jax.Array:
    """How many tokens each row may still draw after this one."""
    return jnp.where(jnp.isin(token, knobs["stop"]), 0, jnp.maximum(left - 1, 0))
