"""The command `jaxtune plan`: from a configuration to what it prints."""

import contextlib
import time

from jaxtune import tune
from jaxtune.config import Config
from jaxtune.console import Bar, console, stage, warn
from jaxtune.data.loader import check_sections
from jaxtune.errors import ModelError, UserError
from jaxtune.hub import resolve_model
from jaxtune.mesh import make_mesh
from jaxtune.models.config import ModelConfig
from jaxtune.models.families import read_config
from jaxtune.plan.compiling import Plan, compile_step
from jaxtune.plan.program import make_step
from jaxtune.plan.report import print_found, print_plan
from jaxtune.plan.search import TRIES, Found, search
from jaxtune.plan.target import Target
from jaxtune.tokenizer import load_tokenizer
from jaxtune.tune.tokens import TokensSection


def plan(config: Config, target: Target, budget: int | None) -> Plan:
    """Compile the step of a configuration for a target and print what it needs.

    budget: bytes of a device's memory; None: the target's own, where it is known.

    Raises:
        UserError: as a run of this configuration would.
    """
    config, model = settled(config, target)
    step = make_step(config, model, make_mesh(config.mesh, target.devices))
    stage(f"Compiling the step for {len(target.devices)} x {target.name}")
    done = compile_step(step, target)
    print_plan(done, target, budget or target.memory, console)
    return done


def search_and_print(config: Config, target: Target, budget: int | None) -> Found:
    """Look for the settings with which a step fits and is fast, and print the best as YAML to paste.

    Raises:
        UserError: no budget is known, or no mesh of these devices is legal.
    """
    budget = budget or target.memory
    if budget is None:
        raise UserError("--search needs --budget, such as --budget 80GB: the memory of one device")
    config, model = settled(config, target)
    bar = Bar(TRIES) if console.is_terminal else None
    started = time.monotonic()

    def tell(done: int, text: str) -> None:
        if bar is None:
            stage(f"Compiling {text}")
        else:
            bar.update(done, text)

    with contextlib.ExitStack() as stack:
        if bar is not None:
            bar.start()
            stack.callback(bar.stop)
        found = search(config, model, target, budget, tell)
    print_found(found, config, target, budget, time.monotonic() - started, console)
    return found


def settled(config: Config, target: Target) -> tuple[Config, ModelConfig]:
    """(the configuration with what is to be known of the target and the tokenizer, the model's settings).

    Raises:
        ModelError: of model_settings.
        ConfigError: what a run would refuse when it reads its data, whatever they are.
    """
    model = model_settings(config)
    config = with_words(for_target(config, target))
    check_sections(config.data, config.eval, config.train, tune.virtual_ids(config.tune, model))
    return config, model


def model_settings(config: Config) -> ModelConfig:
    """From config.json alone.

    Raises:
        ModelError: it is not here, and the hub does not give it.
    """
    try:
        path = resolve_model(config.model.path, config.model.revision, weights=False)
    except ModelError as problem:
        raise ModelError(f"{problem}. A plan reads its config.json and nothing else") from None
    return read_config(path, config.model.overrides)


def with_words(config: Config) -> Config:
    """The configuration with the ids of tune.new_tokens, where the tokenizer is here to give them."""
    section = config.model
    if not isinstance(config.tune, TokensSection) or not config.tune.new_tokens:
        return config
    words = (section.tokenizer, None) if section.tokenizer else (section.path, section.revision)
    try:
        tokenizer = load_tokenizer(resolve_model(*words, weights=False))
    except ModelError as problem:
        warn(
            f"tune.new_tokens: {problem}. Without the tokenizer each is counted as a row more, where a run takes the "
            "rows that no token has first"
        )
        return config
    return config.model_copy(update={"tune": tune.words(config.tune, tokenizer)[1]})


def for_target(config: Config, target: Target) -> Config:
    """The configuration with what `auto` means on the target."""
    if config.precision.compute != "auto" or target.compute is None:
        return config
    precision = config.precision.model_copy(update={"compute": target.compute})
    return config.model_copy(update={"precision": precision})
