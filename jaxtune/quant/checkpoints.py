"""Ready-made quantised checkpoints: which tensors of a file stand for a linear weight, and how they become a leaf.

`quantization_config` of config.json decides, by its quant_method. A method is a row of METHODS and a file beside this.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxtune.errors import ModelError, listing, nearest
from jaxtune.models.weights import Weight
from jaxtune.quant.leaf import Quantized
from jaxtune.safetensors_io import Index


class Tensors(Protocol):
    """A checkpoint's tensors (hf_io.WeightSource)."""

    where: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, key: str, index: Index) -> np.ndarray:
        """The part of a tensor that `index`, a slice for each dimension, takes, in the file's own type."""
        ...


@dataclass(frozen=True)
class Stored:
    """One declared weight, all its layers, as a checkpoint holds it.

    leaf: what it becomes, with a jax.ShapeDtypeStruct for every part, axis 0 the layer. tensors: the shape that each
    of the file's tensors must have which stand for it: no other may be there. read: (tensors, name of a part, key of
    a layer's weight, index) -> that layer's part at `index`, a slice for each of its dimensions, in the part's type.
    Only what lies at the index should be read, but for what the file has between.
    """

    leaf: Quantized
    tensors: dict[str, tuple[int, ...]]
    read: Callable[[Tensors, str, str, Index], np.ndarray]


class Format(Protocol):
    """What a quantization_config says of a checkpoint: a frozen dataclass."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """For messages: `bitsandbytes nf4`."""
        ...

    @property
    def kind(self) -> str | None:
        """The value of model.quantize that means the same; None: there is none."""
        ...

    @property
    def double(self) -> bool:
        """Likewise, of model.double_quant."""
        ...

    def stored(self, weight: Weight, tensors: Tensors | None) -> Stored | None:
        """How this weight is held; None: as a plain tensor. Asked for the layers' linear maps alone.

        tensors: None: nothing can be read, and the config alone tells (`jaxtune plan`).

        Raises:
            ModelError: some layers of a stack are quantised and others not, or otherwise than the config says.
        """
        ...


Reader = Callable[[dict[str, Any], str], Format]  # (quantization_config, where it stands, for errors) -> format


def _bitsandbytes(settings: dict[str, Any], where: str) -> Format:
    from jaxtune.quant.bitsandbytes import read_format

    return read_format(settings, where)


def _gptq(settings: dict[str, Any], where: str) -> Format:
    from jaxtune.quant.gptq_format import read_format

    return read_format(settings, where)


def _awq(settings: dict[str, Any], where: str) -> Format:
    from jaxtune.quant.awq_format import read_format

    return read_format(settings, where)


METHODS: dict[str, Reader] = {"bitsandbytes": _bitsandbytes, "gptq": _gptq, "awq": _awq}


def format_of(settings: dict[str, Any], where: str) -> Format:
    """The format that a quantization_config names.

    Raises:
        ModelError: an unknown method, or settings that it does not know.
    """
    method = settings.get("quant_method")
    if method not in METHODS:
        raise ModelError(
            f"{where}: quantization_config.quant_method is {method!r}; supported: "
            f"{listing(METHODS)}{nearest(str(method), METHODS)}; or use the model's full-precision weights"
        )
    return METHODS[method](settings, where)


def layers_alike(weight: Weight, quantized: list[bool], where: str) -> bool:
    """Whether the layers of a stack are quantised: all of them, or none.

    Raises:
        ModelError: some are and others not.
    """
    if any(quantized) and not all(quantized):
        pairs = list(zip(weight.keys, quantized, strict=True))
        held, plain = ([key for key, own in pairs if own is flag] for flag in (True, False))
        raise ModelError(
            f"{where}: quantised: {listing(held, 3)}; not quantised: {listing(plain, 3)}; the layers of a "
            "model must be alike; quantise all of them or none"
        )
    return all(quantized)
