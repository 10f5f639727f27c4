"""GPTQ and AWQ checkpoints of tiny models, and the dense models that they stand for.

The weights are drawn on their grids, so that both are the same numbers. The packing is written here once more, value
by value into the bits of Python's integers, as the formats say it: it is the reference, and shares nothing with
jaxtune's.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(rows: np.ndarray, bits: int) -> np.ndarray:
    """[R, n] whole numbers -> int32 [R, n * bits / 32], the first of a row in its lowest bits."""
    result = []
    for row in rows:
        number = sum(int(value) << (bits * place) for place, value in enumerate(row))
        raw = number.to_bytes(len(row) * bits // 8, "little")
        result.append(np.frombuffer(raw, "<i4"))
    return np.stack(result)


def numbers(rows: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, m] -> the whole numbers [R, 32 * m / bits] that `words` packed."""
    top = 2**bits - 1
    values = [int.from_bytes(np.ascontiguousarray(row).astype("<i4").tobytes(), "little") for row in rows]
    return np.array([[value >> (bits * i) & top for i in range(rows.shape[1] * 32 // bits)] for value in values])


def dequantised(tensors: dict[str, np.ndarray], bits: int, version: int) -> np.ndarray:
    """The float32 weight [out, in] of a GPTQ layer's tensors."""
    codes, zeros = numbers(tensors["qweight"].T, bits), numbers(tensors["qzeros"], bits).T
    zeros = (zeros + 1) % 2**bits if version == 1 else zeros
    groups = tensors["g_idx"]
    return tensors["scales"].T.astype(np.float32)[:, groups] * (codes - zeros[:, groups]).astype(np.float32)


def draw(shape: tuple[int, int], bits: int, size: int, seed: int, act_order: bool, symmetric: bool):
    """(codes [out, in], scales [out, G], zeros [out, G], groups [in])."""
    rng = np.random.default_rng(seed)
    outputs, inputs = shape
    size = inputs if size == -1 else size
    groups = np.arange(inputs) // size
    if act_order:
        groups = rng.permutation(groups)
    count = -(-inputs // size)
    scales = rng.uniform(0.2, 0.4, (outputs, count)).astype(np.float16) / np.float16(2**bits)
    middle = 2 ** (bits - 1)
    zeros = np.full((outputs, count), middle) if symmetric else rng.integers(1, 2**bits, (outputs, count))
    return rng.integers(0, 2**bits, shape), scales, zeros, groups


def gptq_tensors(codes, scales, zeros, groups, bits: int, version: int, with_groups: bool) -> dict[str, np.ndarray]:
    tensors = {
        "qweight": words(codes, bits).T,
        "qzeros": words((zeros.T - 1) % 2**bits if version == 1 else zeros.T, bits),
        "scales": scales.T,
    }
    if with_groups:
        tensors["g_idx"] = groups.astype(np.int32)
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def awq_tensors(codes, scales, zeros) -> dict[str, np.ndarray]:
    shuffled = lambda rows: rows.reshape(len(rows), -1, 8)[..., AWQ_ORDER].reshape(len(rows), -1)  # noqa: E731
    return {
        "qweight": words(shuffled(codes.T), 4),
        "qzeros": words(shuffled(zeros.T), 4),
        "scales": np.ascontiguousarray(scales.T),
    }


def write(model: Path, home: Path, method: str, settings: dict, *, bits=4, size=32, version=1, act_order=False,
          symmetric=True, with_groups=True, file="config.json", plain="-") -> tuple[Path, Path]:  # fmt: skip
    """(the quantised checkpoint, the dense model): `model` with every layer's linear maps drawn anew.

    settings: of the checkpoint, as its tools write them; file: in which they stand. plain: of the names of maps that
    both have as `model` does.
    """
    tensors = load_file(model / "model.safetensors")
    packed, dense = dict(tensors), dict(tensors)
    names = [key for key in tensors if key.startswith("model.layers.") and key.endswith("proj.weight")]
    names = [key for key in names if plain not in key]
    for seed, key in enumerate(names):
        drawn = codes, scales, zeros, groups = draw(tensors[key].shape, bits, size, seed, act_order, symmetric)
        steps = codes - zeros[:, groups]
        dense[key] = scales.astype(np.float32)[:, groups] * steps.astype(np.float32)
        own = awq_tensors(*drawn[:3]) if method == "awq" else gptq_tensors(*drawn, bits, version, with_groups)
        del packed[key]
        packed |= {f"{key.removesuffix('.weight')}.{name}": array for name, array in own.items()}
    for name, arrays in (("packed", packed), ("dense", dense)):
        shutil.copytree(model, home / name)
        save_file(arrays, home / name / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    if file == "config.json":
        settings = {**config, "quantization_config": {"quant_method": method, **settings}}
    (home / "packed" / file).write_text(json.dumps(settings))
    return home / "packed", home / "dense"
