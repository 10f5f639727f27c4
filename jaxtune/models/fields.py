"""A config.json read field by field: typed, and with nothing left over that nobody looked at."""

import json
import math
from collections.abc import Collection
from typing import Any, NoReturn

from jaxtune.errors import ModelError, nearest

# Fields of Hugging Face configs that do not change what a decoder computes in training or evaluation.
# With pad_token_id transformers looks up a row of the embedding that gets no gradient; here it gets one like any other.
_HARMLESS = """
architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cls_token_id
decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_llama_config
keys_to_ignore_at_inference label2id length_penalty mask_token_id max_length max_window_layers min_length
model_max_length name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
output_attentions output_hidden_states output_scores pad_token_id prefix problem_type remove_invalid_values
repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
HARMLESS = frozenset(_HARMLESS.split())

# Fields that the decoder has no setting for, and the one value at which they do nothing.
NEUTRAL = {
    "add_cross_attention": False,
    "attention_dropout": 0,
    "attn_dropout": 0,
    "embd_pdrop": 0,
    "embedding_dropout": 0,
    "hidden_dropout": 0,
    "is_causal": True,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pretraining_tp": 1,
    "pruned_heads": {},
    "resid_pdrop": 0,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}

LARGEST = 2**31 - 1


class Fields:
    """Reads each field with its type, remembers which were read, and refuses the rest."""

    def __init__(self, values: dict[str, Any], where: str, overrides: Collection[str] = ()):
        self.values, self.where = values, where
        self.overrides = overrides  # names of fields that model.overrides put over those of `where`
        self.defaults: dict[str, Any] = {}  # of absent fields; a null is absent only where the caller has a default
        self.seen: set[str] = set()

    def source(self, name: str) -> str:
        """Where the value of a field comes from."""
        if name in self.overrides:
            return "model.overrides"
        return f"{self.where} with model.overrides" if self.overrides else self.where

    def refuse(self, name: str, why: str) -> NoReturn:
        found = f"is {self.values[name]!r:.200}" if name in self.values else "is missing"
        raise ModelError(f"{self.source(name)}: {name} {found}; {why}")

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(name)
        value = self.values.get(name, self.defaults.get(name))
        return default if value is None else value

    def whole(self, name: str, default: int | None = None, low: int = 1) -> int:
        value = self.get(name, default)
        if type(value) is not int or not low <= value <= LARGEST:
            self.refuse(name, f"expected a whole number from {low} to {LARGEST}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number, not below zero."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            self.refuse(name, "expected a number, not below 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            self.refuse(name, "expected true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.get(name, default)
        if type(value) is not str:
            self.refuse(name, "expected a string")
        return value

    def table(self, name: str) -> dict | None:
        value = self.get(name)
        if value is not None and type(value) is not dict:
            self.refuse(name, "expected an object, or null")
        return value

    def items(self, name: str) -> list | None:
        """A list of strings."""
        value = self.get(name)
        if value is not None and (type(value) is not list or not all(type(item) is str for item in value)):
            self.refuse(name, "expected a list of strings, or null")
        return value

    def only(self, name: str, allowed: Any) -> None:
        """The field must be absent, null, or `allowed`."""
        self.seen.add(name)
        value = self.values.get(name)
        if value is not None and value != allowed:
            self.refuse(name, f"this model does not have it; allowed: {json.dumps(allowed)}")

    def refuse_the_rest(self) -> None:
        """Every field that was not read must be known to change nothing."""
        for name, value in self.values.items():
            if name in self.seen or name in HARMLESS or name.startswith("_") or value is None:
                continue
            if name in NEUTRAL:
                self.only(name, NEUTRAL[name])
            elif name in self.overrides:
                known = sorted(self.seen)
                self.refuse(name, f"no such field of this model is supported{nearest(name, known)}")
            else:
                self.refuse(name, "it may change what the model computes, and it is not supported")
