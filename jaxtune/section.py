"""What every section of a configuration is, and that of a tuning method. No section of a kind is here: config.py has
them, and each tuning method's stands beside the method.
"""

import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import PydanticCustomError

LARGEST = 2**31 - 1  # of an int32, in which a step counts; JAX would take a larger seed for a smaller one
SMALLEST_NUMBER, LARGEST_NUMBER = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Unknown keys are errors, `"3"` is not a number, and inf and nan are nothing at all. A number is one that float32
    holds, and no text has a NUL, which no path can have.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _as_it_stands(cls, given: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        value = handler(given)
        if type(value) is int and type(given) is not int:  # pydantic takes true and 1.0 for the 1 of a Literal
            raise PydanticCustomError("literal_error", "should be an integer")
        for part in _plain(value):
            if isinstance(part, float) and part and not SMALLEST_NUMBER <= abs(part) <= LARGEST_NUMBER:
                sizes = f"{SMALLEST_NUMBER:.3g} to {LARGEST_NUMBER:.3g}"
                raise ValueError(f"is no number of float32: allowed are 0 and, in size, {sizes}")
            if isinstance(part, str) and "\0" in part:
                raise ValueError("has a NUL character; take it out")
        return value


def _plain(value: Any) -> Iterator[Any]:
    """The numbers and texts in a value, but for those of sections, which look at their own."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            yield from _plain(part)
    else:
        yield value


class TuneSection(Section):
    """What is trained, and how. A method's own section has its options, named as PEFT names them."""

    method: str


class Adapting(TuneSection):
    """An option of every method that ends in an adapter."""

    adapter: str | None = None  # a PEFT directory to start from; its settings win, and so does its method


class Targeted(Adapting):
    """Options of a method that sits on some of the model's linear maps, chosen by name."""

    TABLE: ClassVar[bool] = False  # whether it can sit on the embedding
    PATTERNS: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")  # whose first that matches a module decides

    targets: list[str] | str = ["q_proj", "v_proj"]  # names, one regex, or all-linear
    exclude: list[str] | str | None = None  # names or one regex
    layers: list[NonNegative] | NonNegative | None = None  # only these layers, counted from 0
    modules_to_save: list[str] = []  # trained in full and saved with the adapter

    def rank_of(self, module: str) -> int:
        """The rank of what sits on a module; 1 where a method knows no ranks."""
        return 1

    def scale_of(self, module: str) -> float:
        """What its contribution is multiplied by."""
        return 1.0


def adapter_of(section: TuneSection) -> str | None:
    """The directory of the adapter that a section starts from, if its method has any."""
    return section.adapter if isinstance(section, Adapting) else None


NAMES = {str: "text", int: "integer", float: "number", bool: "true, false", type(None): "null", Any: "anything"}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def describe(annotation: Any, metadata: Iterable = (), mark: str = "") -> str:
    """A type and its bounds in words; `mark` stands on both sides of a word to choose."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [bound for extra in arguments[1:] for bound in getattr(extra, "metadata", [extra])]
        text = describe(arguments[0], bounds, mark)
    elif origin is Literal:
        text = ", ".join(f"{mark}{value}{mark}" for value in arguments)
    elif origin in (Union, types.UnionType):
        text = " or ".join(describe(argument, mark=mark) for argument in arguments)
    elif origin is list:
        text = f"list of {describe(arguments[0], mark=mark)}"
    elif origin is dict:
        text = f"map to {describe(arguments[1], mark=mark)}"
    else:
        text = NAMES.get(annotation, "section")
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in metadata
        for name, sign in SIGNS.items()
        if getattr(bound, name, LARGEST) != LARGEST  # that of all integers is told once
    ]
    return f"{text} {', '.join(bounds)}".strip()


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or holds a list of; None: neither."""
    kind = get_args(annotation)[0] if get_origin(annotation) is list else annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None
