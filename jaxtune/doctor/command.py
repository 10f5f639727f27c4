"""The command `jaxtune doctor`: carry out the checks, and print what came of them and what to do."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxtune.config import Config, TrainSection
from jaxtune.console import console, stage
from jaxtune.doctor import attention, machine
from jaxtune.doctor.check import FAIL, PASS, SKIPPED, Check, Outcome, carry_out
from jaxtune.doctor.run import Examined

STYLES = {PASS: "green", FAIL: "bold red", SKIPPED: "dim"}


def doctor(config: Config | None) -> bool:
    """Whether nothing is wrong with this machine and, if one is given, with a configuration."""
    outcomes = []
    for check in checks(config):
        stage(check.name)
        lacking = check.needs_devices and not machine.has_devices()
        outcomes.append(Outcome(check, SKIPPED, "JAX has to find devices first") if lacking else carry_out(check))
    show(outcomes, console)
    return not any(outcome.status == FAIL for outcome in outcomes)


def checks(config: Config | None) -> list[Check]:
    """In the order in which one failing explains the next."""
    train = TrainSection() if config is None else config.train
    found = machine.checks(Path(train.output_dir)) + attention.checks()
    return found if config is None else found + Examined(config).checks()


def show(outcomes: list[Outcome], console: Console) -> None:
    """A row for each check; under one that failed, what to do."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("check", "", "found"):
        table.add_column(name, overflow="fold", no_wrap=name == "check")
    for outcome in outcomes:
        text = Text(outcome.text)
        if outcome.status == FAIL:
            text.append(f"\nTo do: {outcome.check.advice}", "bold")
        table.add_row(outcome.check.name, Text(outcome.status, STYLES[outcome.status]), text)
    console.print()
    console.print(table)
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in STYLES}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count), style="bold")
