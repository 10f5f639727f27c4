"""The command `jaxtune quantize`: its options, and which of them belong to which method.

JAX is imported when it runs.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxtune.errors import ConfigError, nearest

# method -> its own options and their values where they are not given
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "damp": 0.01},
    "rtn": {"bits": 4, "group_size": 128, "sym": True},
    "nf4": {"double_quant": False},
    "int8": {},
}
FORMATS = ("text", "alpaca", "messages", "sharegpt")
BITS = (2, 3, 4, 8)


def quantize(
    model: Annotated[str, typer.Option(help="Hub id, Hugging Face directory or .gguf file.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    method: Annotated[
        str,
        typer.Option(help="gptq, rtn (rounds): files of GPTQ; nf4, int8: of bitsandbytes.", metavar="|".join(METHODS)),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Calibration data, .json or .jsonl; gptq needs it, the others compare on it.", metavar="FILE"
        ),
    ] = None,
    eval: Annotated[str | None, typer.Option(help="Data to compare perplexities on too.", metavar="FILE")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Of both files' rows, as data.format; by default text.", metavar="|".join(FORMATS)),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Rows of data, packed, of each file; by default 128.", min=1)
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row; by default 512.", min=2)] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8; by default 4.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs with one scale; -1: all. By default 128.")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--no-sym", help="Grids symmetric around 0, or not.")] = None,
    desc_act: Annotated[
        bool | None, typer.Option("--desc-act", help="GPTQ: the inputs that matter most first.")
    ] = None,
    damp: Annotated[float | None, typer.Option(help="GPTQ: damping of the Hessian; by default 0.01.")] = None,
    double_quant: Annotated[bool | None, typer.Option("--double-quant", help="nf4: quantise the scales too.")] = None,
) -> None:
    """Make a quantised checkpoint; with --data, print the perplexity before and after."""
    given = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act, "damp": damp}
    settings = _settings(method, given | {"double_quant": double_quant})
    about = _about_data(method, data, {"eval": eval, "format": format, "samples": samples, "length": length})
    from jaxtune.console import say
    from jaxtune.quant.make import Calibration, quantize_model

    calibration = None if data is None else Calibration(data, **about)
    done = quantize_model(model, out, _maker(method, settings), calibration)
    say(
        ", ".join(
            [f"{done.directory}: {method}", *(f"{name} {str(value).lower()}" for name, value in settings.items())]
        )
    )
    for name, pair in (("calibration data", done.calibration), ("evaluation data", done.eval)):
        if pair is not None:
            say(f"Perplexity on the {name}: {pair[0]:.3f} before, {pair[1]:.3f} after")


def _about_data(method: str, data: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the options on the data that are given.

    Raises:
        ConfigError: they would do nothing, or there is no data where the method needs some.
    """
    about = {name: value for name, value in given.items() if value is not None}
    if data is None and method == "gptq":
        raise ConfigError("--method gptq needs --data, rows to quantise for; rtn, nf4 and int8 do without")
    if data is None and about:
        raise ConfigError(f"{', '.join(f'--{name}' for name in about)} would do nothing without --data")
    format = about.get("format", FORMATS[0])
    if format not in FORMATS:
        raise ConfigError(f"--format {format!r}; allowed: {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    return about


def _settings(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's options.

    Raises:
        ConfigError: an unknown method, an option that is another's, or a value that is not allowed.
    """
    if method not in METHODS:
        raise ConfigError(f"--method {method!r}; allowed: {', '.join(METHODS)}{nearest(method, METHODS)}")
    own = METHODS[method]
    for name, value in given.items():
        if value is not None and name not in own:
            users = ", ".join(other for other, names in METHODS.items() if name in names)
            raise ConfigError(f"--{name.replace('_', '-')} is of {users} and would do nothing with --method {method}")
    settings = own | {name: value for name, value in given.items() if value is not None}
    if settings.get("bits", 4) not in BITS:
        raise ConfigError(f"--bits {settings['bits']}; allowed: {', '.join(map(str, BITS))}")
    if not (settings.get("group_size", 1) == -1 or settings.get("group_size", 1) > 0):
        raise ConfigError(f"--group-size {settings['group_size']}; allowed: -1, or 1 and more")
    if not 0 < settings.get("damp", 0.5) < 1:
        raise ConfigError(f"--damp {settings['damp']}; allowed: between 0 and 1")
    return settings


def _maker(method: str, settings: dict[str, Any]) -> Any:
    from jaxtune.quant.makers import FourBitMaker, GroupedMaker, Int8Maker

    if method == "int8":
        return Int8Maker()
    if method == "nf4":
        return FourBitMaker(settings["double_quant"])
    return GroupedMaker(
        settings["bits"], settings["group_size"], settings.get("damp"), settings.get("desc_act", False), settings["sym"]
    )
