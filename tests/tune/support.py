"""Tiny transformers models as our trees, and random adapters on them. The peer is peft, on top of torch."""

from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import tune
from jaxtune.config import TuneSection
from jaxtune.leaves import Leaf
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import Model
from jaxtune.models.families import parse_config
from jaxtune.models.hooks import Hooks
from jaxtune.models.weights import HOOKS, Tree, map_tree
from jaxtune.tune.lora import SETTINGS
from jaxtune.tune.method import get_path

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 11))


class Tuned(NamedTuple):
    model: Model
    params: Tree
    mask: Tree
    section: TuneSection


@cache
def peer_state(family: str, tied: bool, **settings):
    """(transformers config, random state dict): no bias is zero and no norm is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, tie_word_embeddings=tied, **{**SIZES, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.normal_(mean=float("norm" in name), std=0.2)
    return config, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def peer_model(family: str = "qwen2", tied: bool = True, **settings):
    """A new transformers model of these weights."""
    from transformers import AutoModelForCausalLM

    config, state = peer_state(family, tied, **settings)
    model = AutoModelForCausalLM.from_config(deepcopy(config))  # a merge may untie the head, in the config too
    model.load_state_dict(state)
    return model.eval()


def model_config(family: str = "qwen2", tied: bool = True, **settings) -> ModelConfig:
    return parse_config(peer_state(family, tied, **settings)[0].to_dict())


def base_params(weights: Tree, family: str = "qwen2", tied: bool = True, dtype=jnp.float32, **settings) -> Tree:
    """The same weights in our tree; the head of a tied model is left out."""
    state = peer_state(family, tied, **settings)[1]

    def take(weight):
        arrays = [state[key].numpy() for key in weight.keys]
        return jnp.array(arrays[0] if weight.layers is None else np.stack(arrays), dtype)

    return map_tree(take, _of_the_model({name: part for name, part in weights.items() if name != "head" or not tied}))


def _of_the_model(weights: Tree) -> Tree:
    """The declarations without a method's own."""
    own = {name: part for name, part in weights.items() if name != HOOKS}
    return {name: _of_the_model(part) if isinstance(part, dict) else part for name, part in own.items()}


def tuned(section: TuneSection, family: str = "qwen2", tied: bool = True, seed: int = 0, **settings) -> Tuned:
    """The model as the loop makes it: settings resolved, layers laid out, method applied."""
    section = tune.resolve(section)
    config, stacks = tune.layout(section, model_config(family, tied, **settings))
    model = Model.create(config, stacks, hooks=tune.hooks(section, config))
    params = base_params(model.weights, family, tied, **settings)
    return Tuned(model, *tune.apply(section, params, model.weights, seed), section)


def randomised(made: Tuned) -> Tuned:
    """Everything that trains moved by random amounts, padding and layers without an adapter left as they are: an
    adapter after training."""
    random, covered = np.random.default_rng(1), _covered(made)

    def moved(array, size, mask):
        noise = random.normal(size=array.shape) * size * mask
        return jnp.asarray(array + noise, array.dtype)

    def move(path, leaf, train):
        if not isinstance(leaf, Leaf):
            return moved(leaf, 0.1, covered.get((path, None), 1)) if train else leaf
        parts = {name: part for name in leaf.TRAINS if (part := getattr(leaf, name)) is not None}
        return replace(leaf, **{name: moved(x, 0.3, covered.get((path, name), 1)) for name, x in sorted(parts.items())})

    return made._replace(params=map_with_path(move, made.params, made.mask))


def _covered(made: Tuned) -> dict:
    """(path, part) -> 1 for the numbers that the adapter's file has, 0 for the others."""
    files = tune.METHODS[made.section.method].files
    masks = {}
    for entry in files.entries(made.section, made.model.weights) if files else ():
        leaf = get_path(made.params, entry.path)
        array = getattr(leaf, entry.part) if entry.part else leaf
        mask = masks.setdefault((entry.path, entry.part), np.zeros(array.shape))
        target = mask if entry.row is None else mask[entry.row]
        shape = entry.shape[::-1] if entry.turned else entry.shape
        target[tuple(slice(size) for size in shape) if len(shape) == target.ndim else ...] = 1
    return masks


def map_with_path(function, tree: Tree, other: Tree, path: tuple = ()) -> Tree:
    go = partial(map_with_path, function)
    return {
        name: go(value, other[name], (*path, name))
        if isinstance(value, dict)
        else function((*path, name), value, other[name])
        for name, value in tree.items()
    }


def logits(model: Model, params: Tree, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """[batch, time, vocab] of ours."""
    tokens = after_virtual(model, tokens)
    return np.asarray(_compiled(model.config, model.stacks, model.hooks)(params, tokens))[:, len(model.virtual_ids) :]


def after_virtual(model: Model, tokens: np.ndarray) -> np.ndarray:
    """The rows with the method's virtual tokens before them."""
    ids = np.tile(model.virtual_ids, (len(tokens), 1)).astype(tokens.dtype)
    return np.concatenate([ids, tokens], axis=1)


@cache
def _compiled(config: ModelConfig, stacks: tuple[range, ...], hooks: Hooks):
    model = Model.create(config, stacks, hooks=hooks)

    @jax.jit
    def run(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = model.hidden(params, tokens, positions, jnp.ones_like(tokens))
        return model.logits(params, hidden)

    return run


def peer_logits(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """[batch, time, vocab] of a torch model; what peft gives for virtual tokens is left out."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()[:, -tokens.shape[1] :]


def peer_adapter(section: TuneSection, family: str = "qwen2", tied: bool = True, **settings):
    """peft's model for a section, with random numbers in everything that it trains."""
    from peft import LoraConfig, get_peft_model

    values = {theirs: getattr(section, ours) for theirs, ours in SETTINGS.items()}
    values["modules_to_save"] = values["modules_to_save"] or None
    start = {"default": True, "gaussian": "gaussian"}[section.init]
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=start, **values)
    return shaken(get_peft_model(peer_model(family, tied, **settings), config))


def shaken(model):
    """A torch model with random numbers in everything that trains."""
    import torch

    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight) * 0.2
    return model.eval()


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, as a share of the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def settings_id(value) -> str | None:
    """A test's name from its settings. A set has another order in each process, and no name that two agree on."""
    return None if isinstance(value, set) else str(value)
