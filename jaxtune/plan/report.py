"""What a person reads of a plan: memory against the budget, operations, and transfers, all of one device."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxtune.config import Config
from jaxtune.plan.compiling import Plan
from jaxtune.plan.memory import DEVICE, HOST
from jaxtune.plan.search import Found, pasteable
from jaxtune.plan.target import Target

SHOWN = 12  # transfers; the rest are summed up in a line


def print_plan(plan: Plan, target: Target, budget: int | None, console: Console) -> None:
    """The whole report."""
    _line(console, heading(plan, target))
    console.print()
    console.print(memory_table(plan, budget))
    _line(console, verdict(plan, budget), "bold green" if plan.fits(budget) else "bold red")
    console.print()
    console.print(operations_table(plan))
    console.print()
    console.print(transfers_table(plan))


def print_found(found: Found, config: Config, target: Target, budget: int, seconds: float, console: Console) -> None:
    """The best few that a search found, each with its numbers and as YAML to paste over the configuration."""
    _line(
        console,
        f"{found.candidates:,} candidates, {found.compiled} compiled in {seconds:.0f} s for {target.name}; "
        f"{len(found.plans)} fit into {size(budget)}.",
    )
    if found.nearest is not None:
        used = size(found.nearest.memory.peak)
        _line(console, f"The smallest that was compiled needs {used} on each device:", "bold red")
        _line(console, pasteable(found.nearest.step.config, config))
    for number, (plan, estimated) in enumerate(zip(found.plans, found.seconds, strict=True), 1):
        console.print()
        _line(console, f"# {number}: {drivers(plan, estimated)}", "bold")
        _line(console, pasteable(plan.step.config, config))


def drivers(plan: Plan, seconds: float) -> str:
    """What a step needs and what its time comes from, in a line."""
    idle = f", {plan.step.bubble:.0%} of the time idle" if plan.step.bubble else ""
    return (
        f"{size(plan.memory.peak)} a device"
        + (f" and {size(plan.memory.host)} of its host" if plan.memory.host else "")
        + f"; {operations(plan.flops)} of matmuls{idle}, {size(plan.sent)} sent; about {seconds:.2g} s a step"
    )


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text), style=style, soft_wrap=True)


def size(count: float) -> str:
    """`1.23 GB`: decimal units, as memory is sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def operations(count: float) -> str:
    """`1.23 TFLOP`."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}FLOP"
    return f"{count:.0f} FLOP"


def axes_text(sizes: dict[str, int]) -> str:
    """`data 2, fsdp 4`."""
    return ", ".join(f"{axis} {number}" for axis, number in sizes.items() if number > 1) or "no axis above 1"


def heading(plan: Plan, target: Target) -> str:
    step, train = plan.step, plan.step.config.train
    kept = "" if train.micro_batches == 1 else f" in {train.micro_batches} micro-batches"
    return (
        f"One step on {step.mesh.size} x {target.name} ({axes_text(dict(step.mesh.shape))}): {train.batch_size} rows"
        f"{kept} of {step.config.data.max_length:,} tokens; compiled in {plan.seconds:.0f} s. Each device:"
    )


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number and name != "over" else "left")
    return table


def memory_table(plan: Plan, budget: int | None) -> Table:
    """A row for each thing that takes memory; a column for the host's where something lies there."""
    host = plan.memory.host > 0
    table = _table("memory", "device", *(["host"] if host else []))
    rows = {
        "parameters": plan.parameters,
        "optimiser": plan.optimizer,
        "gradients": plan.gradients,
        "activations and temporaries": {DEVICE: plan.temporaries},
        "batch": {DEVICE: max(plan.memory.arguments - plan.parameters[DEVICE] - plan.optimizer[DEVICE], 0)},
    }
    for name, bytes_ in rows.items():
        table.add_row(name, size(bytes_.get(DEVICE, 0)), *([size(bytes_.get(HOST, 0))] if host else []))
    table.add_row("in all", size(plan.memory.peak), *([size(plan.memory.host)] if host else []), style="bold")
    return table


def verdict(plan: Plan, budget: int | None) -> str:
    if plan.refused:
        return f"The compiler refuses: {size(plan.memory.peak)} do not fit into this device."
    if budget is None:
        return "No --budget was given to compare with."
    used = plan.memory.peak / budget
    return f"{'Fits' if used <= 1 else 'Does not fit'}: {used:.0%} of {size(budget)}."


def operations_table(plan: Plan) -> Table:
    """What is computed, and what of it the model asks for."""
    table = _table("matmuls of a step", "")
    table.add_row("computed", operations(plan.flops))
    table.add_row("asked for by the model", operations(plan.model_flops))
    return table


def transfers_table(plan: Plan) -> Table:
    """The transfers that send most."""
    table = _table("sent in a step", "over", "type", "buffer", "times", "sent")
    for one in plan.transfers[:SHOWN]:
        axes = " x ".join(one.axes) or f"{one.devices} devices"
        times = f"{'up to ' if one.at_most else ''}{one.times:,}"
        table.add_row(one.kind, axes, one.dtype, size(one.bytes), times, size(one.sent))
    if rest := plan.transfers[SHOWN:]:
        table.add_row(f"{len(rest)} more", "", "", "", "", size(sum(one.sent for one in rest)))
    table.add_row("in all", "", "", "", "", size(plan.sent), style="bold")
    return table
