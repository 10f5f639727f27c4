"""Checkpoints that transformers and bitsandbytes quantised, in 4 bits or in 8, read into our leaves as they are.

The keys and the packing are those of bitsandbytes 0.50: functional.QuantState.as_dict, nn.modules' Linear4bit and
Linear8bitLt. transformers' quantizer_bnb_4bit.py and quantizer_bnb_8bit.py name the settings.
"""

import json
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.eight_bit import dynamic_codes
from jaxtune.errors import ModelError
from jaxtune.models.fields import Fields
from jaxtune.models.weights import Weight
from jaxtune.quant.checkpoints import Stored, Tensors, layers_alike
from jaxtune.quant.four_bit import BLOCK, CODES, NESTED_BLOCK, FourBit, check_shape, piece_of
from jaxtune.quant.int8 import Int8
from jaxtune.safetensors_io import Index

KINDS = ("nf4", "fp4")
STORAGE_BYTES = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
CHUNK_BYTES = 4 << 20  # of one read of codes
_ROUNDING = 1e-6  # how far a table may be from ours: that of another device's roundings


def read_format(settings: dict[str, Any], where: str) -> "FourBitFormat | EightBitFormat":
    """What a quantization_config of quant_method bitsandbytes says.

    Raises:
        ModelError: a setting is wrong or unknown.
    """
    fields = Fields(settings, f"{where}: quantization_config")
    for name in ("quant_method", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype"):
        fields.get(name)  # these say nothing about the numbers
    for name in ("llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload"):
        fields.get(name)  # of bitsandbytes' own matmul, and of where transformers puts weights
    fields.only("llm_int8_has_fp16_weight", False)
    four, eight = fields.flag("load_in_4bit", False), fields.flag("load_in_8bit", False)
    skipped = tuple(fields.items("llm_int8_skip_modules") or ())
    kind = fields.text("bnb_4bit_quant_type", "fp4")
    double = fields.flag("bnb_4bit_use_double_quant", False)
    storage = fields.text("bnb_4bit_quant_storage", "uint8").removeprefix("torch.")
    fields.refuse_the_rest()
    if four == eight:
        fields.refuse("load_in_4bit", f"and load_in_8bit is {eight}; expected one of the two to be true")
    if eight:
        return EightBitFormat(where, skipped)
    if kind not in KINDS:
        fields.refuse("bnb_4bit_quant_type", "supported: nf4, fp4")
    if storage not in STORAGE_BYTES:
        fields.refuse("bnb_4bit_quant_storage", f"supported: {', '.join(STORAGE_BYTES)}")
    return FourBitFormat(where, kind, double, STORAGE_BYTES[storage], skipped)


def _is_quantized(weight: Weight, tensors: Tensors | None, ending: str, skipped: tuple[str, ...], where: str) -> bool:
    """Whether the tensor `ending` beside each layer's weight says so; without tensors, whether it is not skipped."""
    if tensors is not None:
        return layers_alike(weight, [key + ending in tensors.shapes for key in weight.keys], tensors.where)
    skip = lambda key: any(f".{name}." in f".{key}." for name in skipped)  # noqa: E731 - transformers' own rule, nearly
    return layers_alike(weight, [not skip(key) for key in weight.keys], f"{where}: llm_int8_skip_modules")


@dataclass(frozen=True)
class FourBitFormat:
    """load_in_4bit. double: bnb_4bit_use_double_quant. storage: bytes of a number of the tensor that has the codes."""

    where: str
    kind: str
    double: bool
    storage: int
    skipped: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"bitsandbytes {self.kind}{' with double quantisation' if self.double else ''}"

    def stored(self, weight: Weight, tensors: Tensors | None) -> Stored | None:
        if not _is_quantized(weight, tensors, f".quant_state.bitsandbytes__{self.kind}", self.skipped, self.where):
            return None
        check_shape(weight.shape, weight.key)
        block = BLOCK if tensors is None else self._checked(weight, tensors)
        layout = _Layout(weight.shape, block, self.double)
        names = {key: layout.tensors(key, self.kind, self.storage, tensors) for key in weight.keys}
        found = {name: shape for one in names.values() for name, shape in one.items()}
        return Stored(layout.leaf(len(weight.keys), self.kind), found, layout.read)

    def _checked(self, weight: Weight, tensors: Tensors) -> int:
        """Numbers of a block. Every layer's own description must be of this format, and its tables ours."""
        blocks: set[Any] = set()
        for key in weight.keys:
            state, where = _state(tensors, key, self.kind), f"{tensors.where}: {key}"
            expected: dict[str, Any] = {"quant_type": self.kind, "shape": list(weight.shape)}
            if self.double:
                expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
            for name, value in expected.items():
                if state.get(name) != value:
                    raise ModelError(f"{where}: its quant_state has {name} {state.get(name)!r}; expected {value!r}")
            blocks.add(state.get("blocksize"))
            _check_table(tensors, f"{key}.quant_map", CODES[self.kind])
            if self.double:
                _check_table(tensors, f"{key}.nested_quant_map", dynamic_codes(signed=True))
        if len(blocks) > 1 or not all(type(block) is int and block > 0 and block % 2 == 0 for block in blocks):
            raise ModelError(f"{tensors.where}: {weight.key}: blocksize {blocks}; expected one even number")
        return blocks.pop()


def _state(tensors: Tensors, key: str, kind: str) -> dict[str, Any]:
    """The part of a QuantState that is not tensors."""
    name = f"{key}.quant_state.bitsandbytes__{kind}"
    try:
        state = json.loads(tensors.read(name, (slice(None),)).astype(np.uint8).tobytes())
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise ModelError(f"{tensors.where}: {name} is no JSON object; get a sound copy")
    return state


def _check_table(tensors: Tensors, key: str, ours: np.ndarray) -> None:
    found = tensors.read(key, (slice(None),)) if tensors.shapes.get(key) == ours.shape else None
    if found is None or not np.allclose(found, ours, rtol=_ROUNDING, atol=0):
        raise ModelError(f"{tensors.where}: {key} is not bitsandbytes' table of {ours.size} numbers")


@dataclass(frozen=True)
class _Layout:
    """Where the parts of one layer's FourBit lie in the file's tensors."""

    shape: tuple[int, ...]
    block: int
    double: bool

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // self.block)

    @property
    def pieces(self) -> int:
        """Of a row."""
        return self.shape[1] // piece_of(self.shape[1], self.block)

    def leaf(self, layers: int, kind: str) -> FourBit:
        rows, columns = self.shape
        part = lambda shape, dtype: jax.ShapeDtypeStruct((layers, *shape), dtype)  # noqa: E731
        codes, scales = part((rows, columns // 2), np.uint8), (rows, self.pieces)
        facts: dict[str, Any] = {"shape": self.shape, "kind": kind, "block": self.block}
        if not self.double:
            return FourBit(codes, part(scales, np.float32), **facts)
        nested = part((-(-self.blocks // NESTED_BLOCK),), np.float32)
        return FourBit(codes, part(scales, np.uint8), nested, part((), np.float32), **facts)

    def tensors(self, key: str, kind: str, storage: int, there: Tensors | None) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of one layer."""
        state = f"{key}.quant_state.bitsandbytes__{kind}"
        size = there.shapes[state] if there is not None else (0,)
        found = {state: size, f"{key}.absmax": (self.blocks,), f"{key}.quant_map": (16,)}
        found[key] = (self.shape[0] * self.shape[1] // 2 // storage, 1)
        if self.double:
            found[f"{key}.nested_absmax"] = (-(-self.blocks // NESTED_BLOCK),)
            found[f"{key}.nested_quant_map"] = (256,)
        return found

    def read(self, tensors: Tensors, part: str, key: str, index: Index) -> np.ndarray:
        if part == "codes":
            return self._codes(tensors, key, index)
        if part == "scales":
            return self._scales(tensors, key, index)
        if part == "nested":
            return tensors.read(f"{key}.nested_absmax", index)
        kind = next(kind for kind in KINDS if f"{key}.quant_state.bitsandbytes__{kind}" in tensors.shapes)
        return np.array(_state(tensors, key, kind)["nested_offset"], np.float32)

    def _codes(self, tensors: Tensors, key: str, index: Index) -> np.ndarray:
        """Rows lie one after another: of those that are asked for, all is read and some of it kept."""
        width = self.shape[1] // 2
        start, stop, _ = index[0].indices(self.shape[0])
        step = max(1, CHUNK_BYTES // width)
        cuts = [(first, min(first + step, stop)) for first in range(start, stop, step)]
        return np.concatenate([self._rows(tensors, key, *cut, width)[:, index[1]] for cut in cuts])

    def _rows(self, tensors: Tensors, key: str, start: int, stop: int, width: int) -> np.ndarray:
        storage = self.shape[0] * width // tensors.shapes[key][0]  # bytes of the tensor's numbers
        first, last = start * width // storage, -(-stop * width // storage)
        raw = np.ascontiguousarray(tensors.read(key, (slice(first, last), slice(None)))).view(np.uint8).reshape(-1)
        skip = start * width - first * storage
        return raw[skip : skip + (stop - start) * width].reshape(-1, width)

    def _scales(self, tensors: Tensors, key: str, index: Index) -> np.ndarray:
        (start, stop, _), piece = index[0].indices(self.shape[0]), piece_of(self.shape[1], self.block)
        block: np.ndarray = np.arange(start * self.pieces, stop * self.pieces) // (self.block // piece)
        read = tensors.read(f"{key}.absmax", (slice(block[0], block[-1] + 1),))
        return read[block - block[0]].reshape(-1, self.pieces)[:, index[1]]


@dataclass(frozen=True)
class EightBitFormat:
    """load_in_8bit: LLM.int8."""

    where: str
    skipped: tuple[str, ...]
    name = "bitsandbytes int8"
    kind = "int8"
    double = False

    def stored(self, weight: Weight, tensors: Tensors | None) -> Stored | None:
        beside = [key.removesuffix("weight") for key in weight.keys]
        if tensors is None:
            quantized = _is_quantized(weight, None, "", self.skipped, self.where)
        else:
            quantized = layers_alike(weight, [f"{name}SCB" in tensors.shapes for name in beside], tensors.where)
        if not quantized:
            return None
        found: dict[str, tuple[int, ...]] = dict.fromkeys(weight.keys, weight.shape)
        for name in beside:
            found[f"{name}SCB"] = weight.shape[:1]
            if tensors is not None and f"{name}weight_format" in tensors.shapes:
                _check_row_major(tensors, f"{name}weight_format")
                found[f"{name}weight_format"] = ()
        layers = len(weight.keys)
        codes = jax.ShapeDtypeStruct((layers, *weight.shape), np.int8)
        return Stored(Int8(codes, jax.ShapeDtypeStruct((layers, weight.shape[0]), np.float32)), found, _read_int8)


def _check_row_major(tensors: Tensors, key: str) -> None:
    if tensors.read(key, ()) != 0:
        raise ModelError(f"{tensors.where}: {key} is not 0: the codes are not row by row; save it with a newer version")


def _read_int8(tensors: Tensors, part: str, key: str, index: Index) -> np.ndarray:
    return tensors.read(key if part == "codes" else f"{key.removesuffix('weight')}SCB", index)
