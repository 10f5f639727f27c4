"""What a run is merged into where its base is quantised: the weights that its base was made from, the dequantised ones,
or, when asked, weights that are quantised again. Reading and writing them are loading.py's and quant/again.py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtune import tune
from jaxtune.assemble import Source
from jaxtune.config import Config, ModelSection
from jaxtune.errors import ConfigError, ModelError
from jaxtune.hf_io import open_source
from jaxtune.loading import Opened
from jaxtune.models.decoder import Model
from jaxtune.quant.again import makers_of
from jaxtune.quant.makers import Maker
from jaxtune.quant.scheme import AtLoad, Scheme

ORIGINAL, DEQUANTIZED, QUANTIZED = "original", "dequantized", "quantized"
ALLOWED = (ORIGINAL, DEQUANTIZED, QUANTIZED)


@dataclass(frozen=True)
class Onto:
    """The answer.

    words: which weights these are, for people; empty where the base is not quantised. base: a model to read in place
    of the run's own; None: the run's. makers: of quantised weights, by key. settings: the base's quantization_config.
    """

    words: str = ""
    base: ModelSection | None = None
    makers: dict[str, Maker] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether the result computes what the run does."""
        return self.base is None and not self.makers


def choose(opened: Opened, asked: str | None, base: str | None) -> Onto:
    """What to merge this run into.

    asked: one of ALLOWED; None: the original weights if they are to be had and the exact result otherwise. base: the
    model that a quantised checkpoint was made from.

    Raises:
        ConfigError: it cannot be had, or an option would do nothing.
    """
    config = opened.run
    own = opened.assembled.source
    if not tune.has_adapter(config.tune) and opened.step is None:  # run/model, which is not quantised any more
        if (asked, base, config.model.quantize) == (None, None, None):
            return Onto()
        own = Source.open(config.model)
    if own.scheme is None:
        _check_plain(config, asked, base)
        return Onto()
    has_original = _check(config, own.scheme, asked, base)
    kind = asked or (ORIGINAL if has_original else DEQUANTIZED)
    if kind == DEQUANTIZED:
        return Onto(f"the dequantised weights of its base ({own.scheme.name})")
    section = _original(config.model, base) if has_original else None
    if kind == ORIGINAL:
        assert section is not None
        return Onto(f"the original weights of {section.path}", section)
    settings = own.config.hf.get("quantization_config") or {}
    makers = makers_of(own.scheme, settings, Model.create(own.config).weights, open_source(own.path, own.config.tied))
    start = "dequantised" if section is None else "original"
    return Onto(f"the {start} weights of its base and quantised again ({own.scheme.name})", section, makers, settings)


def _check_plain(config: Config, asked: str | None, base: str | None) -> None:
    for name, value, fits in (("onto", asked, (None, ORIGINAL)), ("base", base, (None,))):
        if value not in fits:
            raise ConfigError(
                f"{name} {value}: the base of this run, {config.model.path}, is not quantised, and the run is merged "
                f"into it as it is; leave {name} out"
            )


def _check(config: Config, scheme: Scheme, asked: str | None, base: str | None) -> bool:
    """Whether there are original weights to merge into."""
    path, is_loftq = config.model.path, config.tune.method == "loftq"
    if base is not None and isinstance(scheme, AtLoad):
        raise ConfigError(f"base {base}: {path} itself has the original weights of this run; leave base out")
    if base is not None and asked == DEQUANTIZED:
        raise ConfigError(f"base {base}: belongs to onto original and quantized and would do nothing with {asked}")
    if is_loftq and asked == ORIGINAL:
        raise ConfigError(
            "onto original: a LoftQ adapter holds what quantising the weights lost, which the original weights have: "
            "merged into them it would count twice; take onto dequantized, which is what was trained"
        )
    has_original = not is_loftq and (isinstance(scheme, AtLoad) or base is not None)
    if asked == ORIGINAL and not has_original:
        raise ConfigError(
            f"onto original: the base of this run, {path}, is a checkpoint that is quantised already ({scheme.name}); "
            "name the model that it was made from (--base PATH), or take onto dequantized"
        )
    return has_original


def _original(model: ModelSection, base: str | None) -> ModelSection:
    """The unquantised model. base: where it lies, if not where the run's does."""
    changed: dict[str, Any] = {"quantize": None, "double_quant": False}
    if base is None:
        return model.model_copy(update=changed)
    words = model.tokenizer or model.path
    section = model.model_copy(update={**changed, "path": base, "revision": None, "tokenizer": words})
    scheme = Source.open(section).scheme
    if scheme is not None:
        raise ModelError(f"base {base}: is quantised itself ({scheme.name}); give the model that it was made from")
    return section
