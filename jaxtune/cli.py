"""The command `jaxtune`: train, preview, generate, chat, export, quantize, plan, doctor, schedule. What they do is
elsewhere; this file reads the command line and turns what can go wrong into one line and an exit code.

Exit codes: 0 done, 2 the input is wrong, 130 stopped by Ctrl-C, 143 stopped by SIGTERM after a save, 75 another
process of the run is gone, is stuck or never came, 1 a failure.

Compiled programs are kept in $JAX_COMPILATION_CACHE_DIR, by default ~/.cache/jaxtune/xla, so that a second start
is quick; JAX_ENABLE_COMPILATION_CACHE=false turns that off.

JAX takes seconds to import, so the commands import what they need when they run.
"""

import contextlib
import functools
import io
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

import jaxtune
from jaxtune.errors import explained
from jaxtune.kept import keep_programs
from jaxtune.quant.command import quantize

app = typer.Typer(
    help="Fine-tune and train decoder language models in JAX: Hugging Face files in, Hugging Face files out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str | None, typer.Option(help="Hub id, Hugging Face directory or .gguf file.", metavar="MODEL")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter directory to put on --model.", metavar="DIR")]
Run = Annotated[str | None, typer.Option(help="Run directory of jaxtune, in place of --model.", metavar="DIR")]
System = Annotated[str | None, typer.Option(help="System message; a run has the one of its data.")]
NewTokens = Annotated[int, typer.Option(help="The answer's length at most, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of together this probability.")]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto: bfloat16, or float32 on a CPU.")]


_report_unraisable = sys.unraisablehook


def _press_again(unraisable: Any) -> None:
    """What is raised in a hook of Python's garbage collector, of which JAX has one, is reported and then forgotten: a
    Ctrl-C that came in there comes once more, when the main thread is out of it."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        _report_unraisable(unraisable)
        return
    press = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    press.daemon = True
    press.start()


sys.unraisablehook = _press_again


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"jaxtune {jaxtune.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    pass


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file; docs/config.md lists its keys.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="Of several processes: where process 0 is.", metavar="HOST:PORT")
    ] = None,
    processes: Annotated[str | None, typer.Option(help="How many; auto: JAX finds out.", metavar="N|auto")] = None,
    process_id: Annotated[int | None, typer.Option(help="Which one this is, from 0.")] = None,
) -> None:
    """Train as a YAML file says. The same command again goes on with a run that was stopped."""
    with _one_line_errors():
        keep_programs()
        _set_flags()
        with _among_others(coordinator, processes, process_id):
            from jaxtune.config import load_config

            settings = load_config(config, overrides or [])
            from jaxtune import loop

            loop.train(settings)


@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    arguments: Annotated[list[str], typer.Argument(metavar="-- train --config FILE ...")],
    processes: Annotated[int, typer.Option(help="How many, on this machine.", min=1)],
    devices_per_process: Annotated[int, typer.Option(help="GPUs of each; on a CPU, devices to make.", min=1)] = 1,
    heartbeat: Annotated[
        int | None, typer.Option(help="Seconds of silence after which one is given up.", min=1)
    ] = None,
) -> None:
    """Train in several processes on this machine, one for each GPU. They end together."""
    with _one_line_errors():
        from jaxtune import launch as launcher

        if heartbeat is not None:
            os.environ[launcher.HEARTBEAT] = str(heartbeat)
        code = launcher.launch(arguments, processes, devices_per_process)
    raise SystemExit(code)


@contextlib.contextmanager
def _among_others(coordinator: str | None, processes: str | None, process_id: int | None) -> Iterator[None]:
    """Join the other processes, where the options or the environment name some, and end with them."""
    from jaxtune import clusters, launch

    given = {clusters.COORDINATOR: coordinator, clusters.PROCESSES: processes, clusters.PROCESS: process_id}
    place = clusters.find_place(os.environ | {name: str(value) for name, value in given.items() if value is not None})
    if place is None:
        yield
        return
    launch.stop_with_launcher()
    # Until training takes signals over, Ctrl-C ends a process whatever it is in, as SIGTERM does: in a wait for the
    # others Python would not come to raise anything.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    clusters.start(place)
    from jaxtune.fate import together

    with together():
        yield


@app.command()
def generate(
    model: Model = None,
    adapter: Adapter = None,
    run: Run = None,
    prompt: Annotated[str | None, typer.Option(help="Plain text to continue.")] = None,
    message: Annotated[str | None, typer.Option(help="What the user says, for the chat template.")] = None,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
) -> None:
    """Answer once. The text alone goes to stdout, as it comes."""
    _one_of(prompt=prompt, message=message)
    if system is not None and message is None:
        raise typer.BadParameter("--system goes with --message; a plain --prompt has no system message")
    with _one_line_errors():
        from jaxtune.sampling import Sampling

        Sampling(temperature, top_k, top_p, seed)  # what is wrong with these is said before anything is loaded
        asked = _load(model, adapter, run, dtype)
        words = prompt if message is None else [{"role": "user", "content": message}]
        asked.system = asked.system if system is None else system
        pieces = asked.generate(words, max_new_tokens, temperature, top_k, top_p, seed, stream=True)
        for piece in pieces:
            _write(piece)
        _write("\n")


@app.command()
def chat(
    model: Model = None,
    adapter: Adapter = None,
    run: Run = None,
    system: System = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model, over several turns. /reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""
    with _one_line_errors():
        from jaxtune.chat import Chat
        from jaxtune.sampling import Sampling

        sampling = Sampling(temperature, top_k, top_p, seed)
        asked = _load(model, adapter, run, dtype)
        asked.system = asked.system if system is None else system
        Chat(asked, sampling, max_new_tokens, _write).talk()


@app.command()
def export(
    run: Annotated[Path, typer.Option(help="Run directory.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    format: Annotated[str, typer.Option(help="peft: the adapter; hf: a whole model, merged.", metavar="peft|hf")],
    dtype: Annotated[str, typer.Option(help="Of a merged model: float32, bfloat16 or float16.")] = "float32",
    onto: Annotated[
        str | None,
        typer.Option(
            help="What a run over a quantised base is merged into. original: the weights that the base was made from, "
            "the default where they are to be had; dequantized: those that it stands for, as in the run; quantized: "
            "the first of these that is there, quantised again as the base is.",
            metavar="original|dequantized|quantized",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that a quantised checkpoint was made from.", metavar="MODEL")
    ] = None,
) -> None:
    """Write a run's model as files that others read, and compare them with the run."""
    with _one_line_errors():
        keep_programs()
        from jaxtune.console import say
        from jaxtune.export import export_run

        done = export_run(run, out, format, dtype, onto, base)
        if done.step is not None:
            say(f"The run has not finished; this is its checkpoint of step {done.step}")
        if done.onto:
            say(f"Merged into {done.onto}")
        say(
            f"{done.directory}: the largest logit difference against "
            f"{'the run' if done.losses is None else 'these weights in memory'} is {done.difference:.2e} "
            f"(allowed: {done.tolerance:g} of the largest logit, {done.largest:.2f})"
        )
        if done.losses is not None:
            found = done.losses
            say(
                f"Mean loss on {found.tokens} tokens of the {found.data}: {found.run:.4f} of the run, "
                f"{found.written:.4f} of what was written, a difference of {found.written - found.run:+.4f}"
            )


@app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT directories of LoRA adapters of one base model.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    weights: Annotated[
        str | None, typer.Option(help="A factor for each; 1 for all by default.", metavar="W,W,...")
    ] = None,
    way: Annotated[
        str,
        typer.Option(help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune; the last four also _svd."),
    ] = "svd",
    rank: Annotated[int | None, typer.Option(help="Of the result, with a way that ends in svd.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the numbers that thinning leaves.")] = None,
    sign: Annotated[
        str | None, typer.Option(help="How ties elects a sign; total by default.", metavar="total|frequency")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare's draws; 0 by default.")] = None,
) -> None:
    """Make one LoRA adapter of several, each times its weight, as PEFT's add_weighted_adapter does."""
    with _one_line_errors():
        from jaxtune.console import say
        from jaxtune.tune.combine import combine as make_one

        factors = [1.0] * len(adapters) if weights is None else _factors(weights, adapters)
        made = make_one(adapters, factors, out, way, rank=rank, density=density, sign=sign, seed=seed)
        say(f"{out}: {way} of {len(adapters)} adapters, rank {made.rank}, on {len(made.targets)} modules")


@app.command()
def preview(
    config: Annotated[Path, typer.Option(help="YAML file, as for train; no weights are read.")],
    rows: Annotated[int, typer.Option(help="How many to show.", min=1)] = 3,
    packs: Annotated[
        bool, typer.Option("--packs", help="As the run packs and shuffles them; else one by one.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Page to write, in place of the terminal.", metavar="FILE")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
) -> None:
    """Show rows of the data as the model sees them: tokens, what is learnt of them, packs."""
    with _one_line_errors():
        from jaxtune.config import load_config

        settings = load_config(config, overrides or [])
        from jaxtune.data.preview import preview as show

        show(settings, rows, html, packs)


@app.command()
def plan(
    config: Annotated[Path, typer.Option(help="YAML file, as for train; its data need not be there.")],
    devices: Annotated[
        int | None, typer.Option(help="How many to pretend to have; else this machine's.", min=1)
    ] = None,
    target: Annotated[str | None, typer.Option(help="cpu, or a TPU slice to compile for.", metavar="v5e:8x8")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory of a device; a number alone is GB.", metavar="80GB")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Look for mesh and memory settings that fit.")] = False,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
) -> None:
    """Compile a step without its weights, and print what it needs of each device."""
    with _one_line_errors():
        from jaxtune.config import load_config
        from jaxtune.plan.target import choose, parse_bytes

        settings = load_config(config, overrides or [])
        size = None if budget is None else parse_bytes(budget)
        keep_programs()
        chosen = choose(target, devices)
        from jaxtune.plan import command

        (command.search_and_print if search else command.plan)(settings, chosen, size)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option(help="YAML file whose data, method and disk are looked at too.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
) -> None:
    """Look whether this machine, and a configuration, are fit to train: exit code 1 when something is not."""
    if config is None and overrides:
        raise typer.BadParameter(f"{overrides[0]}: belongs to a configuration; give its file with --config")
    with _one_line_errors():
        keep_programs()
        from jaxtune.config import load_config

        settings = None if config is None else load_config(config, overrides or [])
        from jaxtune.doctor.command import doctor as examine

        if not examine(settings):
            raise SystemExit(1)


@app.command()
def schedule(
    name: Annotated[str, typer.Option(help="As mesh.schedule.", metavar="1f1b|gpipe|interleaved|zero_bubble")],
    stages: Annotated[int, typer.Option(help="As mesh.pipe.")],
    micro_batches: Annotated[int, typer.Option(help="As train.micro_batches.")],
    virtual: Annotated[int, typer.Option(help="As mesh.virtual_stages.")] = 1,
) -> None:
    """Print a pipeline schedule: ticks from top to bottom, stages from left to right, and its bubble."""
    with _one_line_errors():
        from jaxtune.parallel.schedule import make_schedule, picture

        _write(picture(make_schedule(name, stages, micro_batches, virtual)) + "\n")


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors end it as those of the others do."""

    @functools.wraps(command)
    def run(**options: object) -> None:
        with _one_line_errors():
            keep_programs()
            command(**options)

    return run


app.command()(_told(quantize))


def _load(model: str | None, adapter: str | None, run: str | None, dtype: str):
    _one_of(model=model, run=run)
    keep_programs()
    from jaxtune.api import load_model
    from jaxtune.console import speak_on_stderr, stage
    from jaxtune.loading import require_run

    speak_on_stderr()
    if run is not None:
        require_run(run)
    stage(f"Loading {run or model}")
    return load_model(run or model or "", adapter=adapter, dtype=dtype)


def _factors(weights: str, adapters: list[Path]) -> list[float]:
    """The numbers of --weights. adapters: what stands beside it, among which are those behind a space."""
    from jaxtune.errors import ConfigError

    astray = [f"{path}" for path in adapters if _is_number(f"{path}") and not path.is_dir()]
    if astray:
        meant = ",".join([weights.rstrip(","), *astray])
        raise ConfigError(
            f"adapter {astray[0]}: no such directory, but a number; write --weights {meant}, without spaces"
        )
    parts = weights.split(",")
    if not all(map(_is_number, parts)):
        raise ConfigError(f"--weights {weights!r}: expected numbers with commas between, such as 0.7,0.3")
    return [float(part) for part in parts]


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def _one_of(**options: str | None) -> None:
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if len(given) != 1:
        names = " or ".join(f"--{name}" for name in options)
        found = " and ".join(given) or "neither"
        raise typer.BadParameter(f"give {names}, one of them; found {found}")


def _write(text: str) -> None:
    """A piece of an answer. A terminal gets no control characters: a model's text must not steer it."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    from jaxtune.console import told_when_full

    with told_when_full():
        sys.stdout.write(text)
        sys.stdout.flush()


def _set_flags() -> None:
    """Before JAX is imported: XLA's, for the machine's accelerators."""
    from jaxtune.accelerator import set_flags
    from jaxtune.console import say

    if flags := set_flags():
        say(f"XLA_FLAGS: {flags}, since there are several GPUs")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a person can put right, or did on purpose, ends with one message and its exit code."""
    try:
        yield
    except BrokenPipeError:  # nobody reads on
        raise SystemExit(1) from None
    except (Exception, KeyboardInterrupt) as error:
        told = explained(error)
        if told is None:
            raise
        _leave(*told)


def _leave(message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)  # noqa: T201 - the console may be on stdout
    raise SystemExit(code)


def main(arguments: list[str] | None = None) -> None:
    """Do as the command line says. arguments: in its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed before Python began
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a locale or half a character has no bytes for is escaped
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is typed and no text is refused where it is read
    try:
        app(arguments, prog_name="jaxtune")
    finally:
        for stream in (sys.stdout, sys.stderr):
            _give_up_unwritten(stream)


def _give_up_unwritten(stream: TextIO) -> None:
    """Without this, Python's own flush at the end would complain of what a pipe or a disk did not take."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
