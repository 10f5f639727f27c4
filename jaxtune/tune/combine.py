"""Several LoRA adapters made into one, from their files alone: no model is loaded.

As PEFT's `add_weighted_adapter` does it (peft 0.21), whose names these are. linear adds up A and B each; cat is exact,
of the sum of the ranks; svd is the best of a given rank. ties (Yadav et al. 2023, arXiv 2306.01708), dare_linear and
dare_ties (Yu et al. 2023, arXiv 2311.03099) and magnitude_prune thin the adapters out first; with _svd behind them
they do so with whole weight changes in place of A and B.
"""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtune.errors import AdapterError, ConfigError, listing
from jaxtune.files import check_new, expanded, read_json, sole_writer
from jaxtune.tune.lora import LoraSection
from jaxtune.tune.names import is_saved
from jaxtune.tune.peft_config import CONFIG_NAME, read_config
from jaxtune.tune.peft_files import PREFIX
from jaxtune.tune.peft_io import write_adapter
from jaxtune.tune.peft_tensors import TENSORS_NAME, AdapterFile, are_one_weight, open_adapter

THINNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
WAYS = ("linear", "cat", "svd", *THINNING, *(f"{way}_svd" for way in THINNING))
SIGNS = ("total", "frequency")
NAMES = re.compile(r"(?P<module>.+)\.lora_(?P<kind>A\.weight|B\.weight|embedding_A|embedding_B)")
FIRST = ("lora_A.weight", "lora_embedding_A")
BASE_WEIGHT, TABLES = ".base_layer.weight", (".lm_head.weight", ".embed_tokens.weight")

Factors = tuple[np.ndarray, np.ndarray]  # A [rank, in], B [out, rank], as PEFT's file has them


@dataclass(frozen=True)
class Adapter:
    """One adapter: the factors and the scale of each module."""

    section: LoraSection
    factors: dict[str, Factors]
    file: AdapterFile
    copies: list[str]  # the keys of frozen base weights: PEFT stores head and embedding with LoRA on one, or when asked
    base: tuple[str | None, str | None]  # the base model's name and revision, as far as the file tells

    @classmethod
    def read(cls, directory: Path) -> "Adapter":
        section, file = read_config(directory), open_adapter(directory)
        if not isinstance(section, LoraSection):
            raise AdapterError(f"{directory}: method {section.method}; only plain LoRA adapters can be combined")
        found: dict[str, dict[str, np.ndarray]] = {}
        copies = [key for key in file.shapes if _is_copy(key, section, file)]
        for key in (key for key in file.shapes if key not in copies):
            match = NAMES.fullmatch(key.removeprefix(PREFIX))
            if match is None:
                raise AdapterError(
                    f"{file.path}: {key} is no factor of a LoRA; weights that train whole (modules_to_save, biases) "
                    "cannot be combined"
                )
            kind = match["kind"].removeprefix("embedding_")[0]
            found.setdefault(match["module"], {})[kind] = _read(file, key)
        half = [module for module, pair in found.items() if pair.keys() != {"A", "B"}]
        if half:
            raise AdapterError(f"{file.path}: A or B is missing of {listing(half)}")
        told = read_json(directory / CONFIG_NAME, AdapterError)
        keys = "base_model_name_or_path", "revision"
        name, revision = (told[key] if isinstance(told.get(key), str) else None for key in keys)
        factors = {module: (pair["A"], pair["B"]) for module, pair in found.items()}
        return cls(section, factors, file, copies, (name, revision))

    @property
    def rank(self) -> int:
        return max(self.section.rank, *self.section.rank_pattern.values(), 0)


def _is_copy(key: str, section: LoraSection, file: AdapterFile) -> bool:
    """Whether a tensor is the weight under the factors of its module, or a table that does not train."""
    if key.endswith(BASE_WEIGHT):
        return any(f"{_module_of(key)}.{name}" in file.shapes for name in FIRST)
    return key.endswith(TABLES) and not is_saved(_module_of(key), section.modules_to_save)


def _module_of(key: str) -> str:
    """Of a weight, also where it lies under factors."""
    return key.removesuffix(BASE_WEIGHT).removesuffix(".weight")


def _check_copies(adapters: list[Adapter]) -> None:
    """The copies say what model an adapter was made for."""
    first: dict[str, tuple[AdapterFile, str]] = {}
    for adapter in adapters:
        for key in adapter.copies:
            other, name = first.setdefault(_module_of(key), (adapter.file, key))
            mine, theirs = adapter.file.read(key, ...), other.read(name, ...)
            if mine.shape != theirs.shape or not are_one_weight(mine, theirs):
                raise AdapterError(
                    f"{adapter.file.path}: {key} is another weight than in {other.path}; the adapters were made for "
                    "different base models"
                )


def _read(file: AdapterFile, key: str) -> np.ndarray:
    value: np.ndarray = file.read(key, tuple(slice(None) for _ in file.shapes[key])).astype(np.float32)
    if not np.isfinite(value).all():
        raise AdapterError(f"{file.path}: {key} has numbers that are not finite (NaN or infinity)")
    return value


def combine(
    directories: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    way: str = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    sign: str | None = None,
    seed: int | None = None,
) -> LoraSection:
    """Write the adapter that these make together, each times its weight, and give its settings.

    way: one of WAYS. rank: of what a way with svd makes; None: the largest of the adapters'. density: the share of
    numbers that thinning leaves, above 0 and up to 1. sign: one of SIGNS, by which ties elects one; None: total.
    seed: of dare's draws, 0 or more; None: 0.

    Raises:
        ConfigError: an option is wrong, or does nothing with this way.
        AdapterError: not plain LoRA adapters of one model, or `linear` and the like with ranks or modules that differ;
            `out` is there.
    """
    _check_options(directories, weights, way, rank, density, sign, seed)
    out = expanded(out)
    check_new(out, AdapterError)
    adapters = [Adapter.read(expanded(directory)) for directory in directories]
    _check_copies(adapters)
    size = _rank_of(adapters, way, rank)
    modules = sorted({module for adapter in adapters for module in adapter.factors})
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        terms = [
            Term(adapter.factors[module], weight, adapter.section.scale_of(module))
            for adapter, weight in zip(adapters, weights, strict=True)
            if module in adapter.factors
        ]
        _check_shapes(module, [term.factors for term in terms], way)
        thin = _thinning(way, density, sign or SIGNS[0], zlib.crc32(module.encode()) + (seed or 0))
        a, b = _padded(_finite(module, lambda: _factors(way, terms, thin, size)), size)  # noqa: B023
        names = ("lora_embedding_A", "lora_embedding_B") if _is_table(module) else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{module}.{name}": part for name, part in zip(names, (a, b), strict=True)}
    section = LoraSection(rank=size, alpha=size, targets=modules)
    bases = {adapter.base for adapter in adapters}
    base, revision = bases.pop() if len(bases) == 1 else (None, None)
    with sole_writer(out, AdapterError):
        write_adapter(out, section, {}, {TENSORS_NAME: tensors}, base, revision=revision)
    return section


def _finite(module: str, make: Callable[[], Factors]) -> Factors:
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            found = make()
        if all(np.isfinite(part).all() for part in found):
            return found
    except np.linalg.LinAlgError:  # svd says so of what is not finite
        pass
    raise AdapterError(f"{module}: what comes out is more than float32 holds; give smaller weights")


def _check_options(directories, weights, way, rank, density, sign, seed) -> None:
    if way not in WAYS:
        raise ConfigError(f"way {way!r}; allowed: {', '.join(WAYS)}")
    if len(directories) != len(weights) or len(directories) < 2:
        raise ConfigError(
            f"{len(directories)} adapters and {len(weights)} weights; give two or more, and a weight each"
        )
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights {listing([f'{weight:g}' for weight in weights])}; allowed: finite numbers")
    thins = way.removesuffix("_svd") in THINNING
    if thins != (density is not None):
        raise ConfigError(f"density goes with {', '.join(THINNING)} (and _svd), and they need it; way is {way}")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density {density}; allowed: above 0, up to 1")
    if rank is not None and (not way.endswith("svd") or rank < 1):
        raise ConfigError(f"rank {rank}: 1 or more, and only with a way that ends in svd; way is {way}")
    kind = way.removesuffix("_svd")
    if sign is not None and (not kind.endswith("ties") or sign not in SIGNS):
        raise ConfigError(f"sign {sign!r}: {' or '.join(SIGNS)}, and only with ties and dare_ties; way is {way}")
    if seed is not None and (not kind.startswith("dare") or seed < 0):
        raise ConfigError(f"seed {seed}: 0 or more, and only with dare_linear and dare_ties, which draw; way is {way}")


def _rank_of(adapters: list[Adapter], way: str, rank: int | None) -> int:
    ranks = [adapter.rank for adapter in adapters]
    if way == "cat":
        return sum(ranks)
    if way.endswith("svd"):
        return rank or max(ranks)
    _check_ranks(ranks, way)
    return ranks[0]


def _check_ranks(ranks: list[int], way: str, where: str = "") -> None:
    if way != "cat" and not way.endswith("svd") and len(set(ranks)) > 1:
        others = f"{way}_svd" if way in THINNING else "svd or cat"
        raise AdapterError(
            f"{where}way {way} adds up A and B themselves, so the ranks must agree; found {ranks}: take {others}"
        )


def _check_shapes(module: str, factors: list[Factors], way: str) -> None:
    shapes = {(a.shape[1], b.shape[0]) for a, b in factors}
    if len(shapes) > 1:
        raise AdapterError(f"{module}: the adapters are of models of other sizes: {sorted(shapes)}")
    _check_ranks([a.shape[0] for a, _ in factors], way, f"{module}: ")


def _is_table(module: str) -> bool:
    return module.rpartition(".")[2] == "embed_tokens"


Thin = Callable[[list[np.ndarray], list[float]], np.ndarray]


class Term(NamedTuple):
    """What an adapter has of one module: weight * scale * (B A) is its part of the whole."""

    factors: Factors
    weight: float
    scale: float


def _factors(way: str, terms: list[Term], thin: Thin, rank: int) -> Factors:
    if way == "cat":
        return _concatenated(terms)
    if way == "svd":
        return _of_rank(*_concatenated(terms), rank)
    if way.endswith("_svd"):
        deltas = [(b @ a * np.float32(scale)) for (a, b), _, scale in terms]
        return _split(thin(deltas, [term.weight for term in terms]), rank)
    return _each_factor(terms, thin)


def _each_factor(terms: list[Term], thin: Thin) -> Factors:
    """A and B added up each by itself: the square root of a term's weight to both, its sign to A."""
    roots = [math.sqrt(abs(weight * scale)) for _, weight, scale in terms]
    signed = [math.copysign(root, term.weight) for root, term in zip(roots, terms, strict=True)]
    return thin([term.factors[0] for term in terms], signed), thin([term.factors[1] for term in terms], roots)


def _concatenated(terms: list[Term]) -> Factors:
    a = np.concatenate([a * np.float32(weight * scale) for (a, _), weight, scale in terms])
    return a, np.concatenate([term.factors[1] for term in terms], axis=1)


def _of_rank(a: np.ndarray, b: np.ndarray, rank: int) -> Factors:
    """The best factors of `rank` of b a, which is never formed: the small matrix between two QR factors has its SVD."""
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    u, s, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return ((q_a @ v.T)[:, :rank].T).astype(np.float32), ((q_b @ u)[:, :rank] * s[:rank]).astype(np.float32)


def _split(delta: np.ndarray, rank: int) -> Factors:
    u, s, v = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    return v[:rank].astype(np.float32), (u[:, :rank] * s[:rank]).astype(np.float32)


def _padded(factors: Factors, rank: int) -> Factors:
    """Zeros up to `rank`, where a module has fewer."""
    a, b = factors
    more = rank - a.shape[0]
    return np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))


def _thinning(way: str, density: float | None, sign: str, seed: int) -> Thin:
    """How tensors are added up: each times its weight, after thinning."""
    random = np.random.default_rng(seed)
    kind = way.removesuffix("_svd")

    def thin(tensors: list[np.ndarray], weights: list[float]) -> np.ndarray:
        if density is not None:
            drop = _drop_at_random if kind.startswith("dare") else _drop_small
            tensors = [drop(x, density, random) for x in tensors]
        stack = np.stack(tensors)
        weighted = stack * np.array(weights, np.float32).reshape(-1, *[1] * (stack.ndim - 1))
        return _elected(stack, weighted, sign) if kind.endswith("ties") else weighted.sum(axis=0)

    return thin


def _drop_small(x: np.ndarray, density: float, random: np.random.Generator) -> np.ndarray:
    """The share `density` of the numbers that are largest in size; zeros for the rest."""
    kept = np.argsort(-np.abs(x).ravel(), kind="stable")[: int(density * x.size)]
    mask: np.ndarray = np.zeros(x.size, bool)
    mask[kept] = True
    return x * mask.reshape(x.shape)


def _drop_at_random(x: np.ndarray, density: float, random: np.random.Generator) -> np.ndarray:
    """Each number with probability `density`, scaled up so that the expected value stays."""
    return (x * (random.random(x.shape) < density) / density).astype(np.float32)


def _elected(stack: np.ndarray, weighted: np.ndarray, sign: str) -> np.ndarray:
    """The mean over the tensors that agree with the majority's sign, number by number."""
    signs = np.sign(stack)
    majority = np.where((stack if sign == "total" else signs).sum(axis=0) >= 0, 1, -1)
    agrees = signs == majority
    return ((weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)).astype(np.float32)
