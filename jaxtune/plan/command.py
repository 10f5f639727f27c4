"""The command `jaxtune plan`: from a configuration to what it prints."""

from rich.console import Console

from jaxtune.config import Config
from jaxtune.console import stage
from jaxtune.hub import resolve_model
from jaxtune.mesh import make_mesh
from jaxtune.models.config import ModelConfig
from jaxtune.models.families import read_config
from jaxtune.plan.compiling import Plan, compile_step
from jaxtune.plan.program import make_step
from jaxtune.plan.report import report
from jaxtune.plan.target import Target


def plan(config: Config, target: Target, budget: int | None, console: Console) -> Plan:
    """Compile the step of a configuration for a target and print what it needs.

    budget: bytes of a device's memory; None: the target's own, where it is known.

    Raises:
        UserError: as a run of this configuration would.
    """
    config = for_target(config, target)
    model = model_settings(config)
    step = make_step(config, model, make_mesh(config.mesh, target.devices))
    stage(f"Compiling the step for {len(target.devices)} x {target.name}")
    done = compile_step(step, target)
    console.print(report(done, target, budget or target.memory))
    return done


def model_settings(config: Config) -> ModelConfig:
    """From config.json alone."""
    path = resolve_model(config.model.path, config.model.revision, weights=False)
    return read_config(path, config.model.overrides)


def for_target(config: Config, target: Target) -> Config:
    """The configuration with what `auto` means on the target."""
    if config.precision.compute != "auto" or target.compute is None:
        return config
    precision = config.precision.model_copy(update={"compute": target.compute})
    return config.model_copy(update={"precision": precision})
