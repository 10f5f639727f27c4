"""What GPTQ and AWQ checkpoints have in common: which tensors stand for a weight, and how they become a `Grouped` leaf.

Their tensors' layouts are gptq_format.py's and awq_format.py's.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.errors import ModelError
from jaxtune.models.fields import Fields
from jaxtune.models.weights import Weight
from jaxtune.quant.checkpoints import Stored, Tensors, layers_alike
from jaxtune.quant.grouped import Grouped
from jaxtune.safetensors_io import Index

# Fields of either's settings that say how the numbers were found, or how another tool computes with them.
_HARMLESS = """
act_group_aware backend batch_size block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent dataset
desc_act disable_exllama do_fuse exllama_config fuse_max_seq_len fail_safe failsafe foem gptaq hyb_act
max_input_length meta model_file_base_name model_name_or_path model_seqlen module_name_preceding_first_block
modules_in_block_to_quantize modules_to_fuse modules_to_not_convert mse offload_to_disk pad_token_id quant_method
method static_groups sym tokenizer true_sequential use_cuda_fp16 use_exllama v2 v2_alpha zero_point
"""
HARMLESS = frozenset(_HARMLESS.split())
# Those that name what is not supported, and the value at which they do nothing.
NEUTRAL: dict[str, Any] = {
    "adapter": None,
    "awq_gemm_checkpoint": False,
    "dynamic": {},
    "is_marlin_format": False,
    "lm_head": False,
    "pack_dtype": "int32",
    "rotation": None,
}
WORD = 32  # bits


@dataclass(frozen=True)
class GroupedFormat:
    """The settings of a checkpoint. A subclass knows the layout of its tensors.

    size: inputs of a group; -1: all of them are one. act_order: whether the settings say that groups may be of any
    inputs. named: parts of module names, of which one must be in a quantised module's; None: any. skipped: of which
    none may be.
    """

    where: str
    bits: int
    size: int
    act_order: bool
    named: tuple[str, ...] | None
    skipped: tuple[str, ...]

    kind = None  # model.quantize makes no such weights
    double = False

    @property
    def name(self) -> str:
        raise NotImplementedError

    def shapes(self, inputs: int, outputs: int, groups: int) -> dict[str, tuple[int, ...]]:
        """Of each tensor, by the last part of its key."""
        raise NotImplementedError

    def codes(self, tensors: Tensors, module: str, index: Index) -> np.ndarray:
        """`Grouped.codes` of one layer, at the index."""
        raise NotImplementedError

    def zeros(self, tensors: Tensors, module: str, index: Index) -> np.ndarray:
        raise NotImplementedError

    def stored(self, weight: Weight, tensors: Tensors | None) -> Stored | None:
        """As checkpoints.Format has it."""
        modules = [module_of(key) for key in weight.keys]
        if not self._is_quantised(weight, modules, tensors):
            return None
        outputs, inputs = weight.shape
        size = inputs if self.size == -1 else self.size
        groups = -(-inputs // size)
        for what, count in (("inputs", inputs), ("outputs", outputs)):
            if count * self.bits % WORD:
                raise ModelError(
                    f"{self.where}: {weight.key}: {count} {what} of {self.bits} bits do not fill whole words of "
                    f"{WORD} bits; supported: a multiple of {WORD // self.bits if WORD % self.bits == 0 else WORD}"
                )
        shapes = self.shapes(inputs, outputs, groups)
        is_ordered = self.act_order if tensors is None else self._is_ordered(tensors, modules, inputs, size, groups)
        kind = np.dtype(np.float16) if tensors is None else self._kind(tensors, modules)
        part = lambda *shape, dtype: jax.ShapeDtypeStruct((len(modules), *shape), dtype)  # noqa: E731
        leaf = Grouped(
            part(outputs, inputs * self.bits // 8, dtype=np.uint8),
            part(outputs, groups, dtype=kind),
            part(outputs, groups, dtype=np.uint8),
            part(inputs, dtype=np.int32) if is_ordered else None,
            bits=self.bits,
            group=size,
            inputs_in_all=inputs,
        )
        keys = {f"{module}.{suffix}": shape for module in modules for suffix, shape in shapes.items()}
        return Stored(leaf, keys | _optional(tensors, modules, inputs, outputs), self._read)

    def _is_quantised(self, weight: Weight, modules: list[str], tensors: Tensors | None) -> bool:
        if tensors is not None:
            return layers_alike(weight, [f"{module}.qweight" in tensors.shapes for module in modules], self.where)
        named = self.named is None or any(name in modules[0] for name in self.named)
        return named and not any(name in modules[0] for name in self.skipped)

    def _is_ordered(self, tensors: Tensors, modules: list[str], inputs: int, size: int, groups: int) -> bool:
        """Whether any layer's groups are other than one after another."""
        plain: np.ndarray = np.arange(inputs) // size
        ordered = False
        for key in (f"{module}.g_idx" for module in modules):
            if key not in tensors.shapes:
                continue
            if tensors.shapes[key] != (inputs,):
                return ordered  # refused where all shapes are
            found = tensors.read(key, (slice(None),))
            if found.min() < 0 or found.max() >= groups:
                raise ModelError(f"{self.where}: {key} names groups {found.min()} to {found.max()} of {groups}")
            ordered |= not np.array_equal(found, plain)
        return ordered

    def _kind(self, tensors: Tensors, modules: list[str]) -> np.dtype:
        """The type of the scales: that of the file, if it is there."""
        keys = [key for key in (f"{module}.scales" for module in modules) if key in tensors.shapes]
        corner = (slice(0, 1), slice(0, 1))
        kinds = {tensors.read(key, corner).dtype for key in keys if len(tensors.shapes[key]) == 2}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def _read(self, tensors: Tensors, part: str, key: str, index: Index) -> np.ndarray:
        module = module_of(key)
        if part == "scales":
            return np.ascontiguousarray(tensors.read(f"{module}.scales", index[::-1]).T)
        if part == "groups":
            if f"{module}.g_idx" in tensors.shapes:
                return tensors.read(f"{module}.g_idx", index)
            inputs = tensors.shapes[f"{module}.qweight"][0] * WORD // self.bits
            return np.arange(*index[0].indices(inputs)) // (inputs if self.size == -1 else self.size)
        read = self.codes if part == "codes" else self.zeros
        return np.ascontiguousarray(read(tensors, module, index))


def module_of(key: str) -> str:
    return key.removesuffix(".weight")


def _optional(tensors: Tensors | None, modules: list[str], inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Tensors that some tools write and others do not: groups, and biases of zeros where the model has none."""
    found: dict[str, tuple[int, ...]] = {}
    if tensors is None:
        return found
    for module in modules:
        if f"{module}.g_idx" in tensors.shapes:
            found[f"{module}.g_idx"] = (inputs,)
        bias = f"{module}.bias"
        if tensors.shapes.get(bias) == (outputs,) and not tensors.read(bias, (slice(None),)).any():
            found[bias] = (outputs,)
    return found


def covering(cut: slice, size: int, per: int) -> tuple[slice, slice]:
    """(words that hold the items of `cut`, these items among the words' own). per: items of a word."""
    start, stop, _ = cut.indices(size)
    first = start // per
    return slice(first, -(-stop // per)), slice(start - first * per, stop - first * per)


def settings_of(values: dict[str, Any], where: str, names: dict[str, tuple[str, ...]]) -> tuple[Fields, dict[str, Any]]:
    """Fields, ready to be read, and the values of those that have several names; every other one is known.

    names: what a field is called here -> what it may be called there.

    Raises:
        ModelError: two names of one field that disagree, or a field that is not known.
    """
    fields = Fields(values, where)
    found: dict[str, Any] = {}
    for ours, theirs in names.items():
        given = {name: values[name] for name in theirs if values.get(name) is not None}
        fields.seen.update(theirs)
        if len({repr(value).lower() for value in given.values()}) > 1:
            raise ModelError(f"{where}: {' and '.join(given)} are one setting and disagree: {given}")
        found[ours] = next(iter(given.values()), None)
    fields.seen.update(HARMLESS)
    for name, value in NEUTRAL.items():
        if values.get(name) not in (None, value, {}):
            fields.refuse(name, f"not supported; allowed: {value!r}")
        fields.seen.add(name)
    fields.refuse_the_rest()
    return fields, found


def whole(found: dict[str, Any], name: str, where: str, allowed: tuple[int, ...] | None = None) -> int:
    """A whole number that must be there. allowed: which; None: -1, or 1 and more."""
    value = found[name]
    fits = type(value) is int and (value in allowed if allowed else value == -1 or value > 0)
    if not fits:
        what = ", ".join(map(str, allowed)) if allowed else "-1 (one group), or 1 and more"
        raise ModelError(f"{where}: {name} is {value!r:.100}; allowed: {what}")
    return value


def modules_named(fields: Fields, name: str) -> tuple[str, ...] | None:
    """A list of names, or of lists of names."""
    value = fields.get(name)
    if value is None:
        return None
    flat = [item for entry in value for item in (entry if isinstance(entry, list) else [entry])]
    return tuple(str(item) for item in flat)
