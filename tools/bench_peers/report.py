"""What the rounds of the benchmark come to: medians with their spread, the ratio to the best torch peer, a table and
a picture.

A report is what the JSON file holds: {"device", "versions", "cases": {name: {"says", "flops_per_token", "sides"}}} and
more; a side is {"why": null or what it did not run for, "is_torch": bool, "rounds": answers of the side's script}.
"""

import statistics
from pathlib import Path
from typing import Any

SHOWN = ("peak_gb", "load_seconds", "compile_seconds", "first_step_seconds", "first_loss", "last_loss")


def summarise(report: dict, ours: str) -> None:
    """Put into every case that is there its sides' `summary`, the `best` torch peer and the `ratio` to it."""
    rate = report["device"]["matmul_flops"]
    for case in report["cases"].values():
        for side in case["sides"].values():
            side["summary"] = summary(side["rounds"], case["flops_per_token"], rate) if ran(side) else None
        case["best"], case["ratio"] = against_best(case["sides"], ours)


def ran(side: dict) -> bool:
    return side["why"] is None and bool(side["rounds"])


def summary(rounds: list[dict], flops_per_token: float, matmul_flops: float) -> dict[str, Any]:
    """Medians over the rounds; the rate of tokens with its slowest and fastest round."""
    rates = [one["tokens"] / one["seconds"] for one in rounds]
    flops = statistics.median(rates) * flops_per_token
    medians = {name: middle([one[name] for one in rounds]) for name in SHOWN}
    return medians | {
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "supervised_per_second": statistics.median(one["supervised"] / one["seconds"] for one in rounds),
        "model_tflops": flops / 1e12,
        "share": flops / matmul_flops,
    }


def middle(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def against_best(sides: dict[str, dict], ours: str) -> tuple[str | None, dict[str, float] | None]:
    """(the torch peer with the highest median, ours over it: of the medians, and the least and most of a round)."""
    peers = {name: side for name, side in sides.items() if side["is_torch"] and ran(side)}
    if not peers:
        return None, None
    best = max(peers, key=lambda name: peers[name]["summary"]["tokens_per_second"])
    if ours not in sides or not ran(sides[ours]):
        return best, None
    rates = [[one["tokens"] / one["seconds"] for one in sides[name]["rounds"]] for name in (ours, best)]
    paired = [mine / its for mine, its in zip(*rates)]
    return best, {
        "median": statistics.median(rates[0]) / statistics.median(rates[1]),
        "lowest": min(paired),
        "highest": max(paired),
    }


HEAD = (
    "real tokens/s (slowest to fastest)",
    "supervised tokens/s",
    "model TFLOP/s",
    "share of the matmul rate",
    "peak GB",
    "compile s",
    "first step s",
    "of the best torch peer",
)


def table(report: dict) -> str:
    """Markdown: a table of every case."""
    device = report["device"]
    lines = [
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"{device['name']}: {device['matmul_flops'] / 1e12:.3g} TFLOP/s in a matmul alone, {report['dtype']}",
    ]
    for name, case in report["cases"].items():
        lines += ["", f"**{name}**: {case['says']}", "", f"| | {' | '.join(HEAD)} |", "|---" * (len(HEAD) + 1) + "|"]
        lines += [line(side_name, side, case) for side_name, side in case["sides"].items()]
        if case["ratio"]:
            ratio = case["ratio"]
            spread = f"{ratio['lowest']:.2f} to {ratio['highest']:.2f} in a round"
            lines += ["", f"jaxtune / {case['best']}, the best torch peer: {ratio['median']:.2f} ({spread})"]
    return "\n".join(lines)


def line(name: str, side: dict, case: dict) -> str:
    if not ran(side):
        return f"| {name} | {side['why'] or 'no round'} |" + " |" * (len(HEAD) - 1)
    found = side["summary"]
    best = case["sides"][case["best"]]["summary"]["tokens_per_second"] if case["best"] else None
    cells = [
        f"{found['tokens_per_second']:,.1f} ({found['slowest']:,.1f} to {found['fastest']:,.1f})",
        f"{found['supervised_per_second']:,.1f}",
        f"{found['model_tflops']:.3g}",
        f"{found['share']:.0%}",
        f"{found['peak_gb']:.1f}",
        "" if found["compile_seconds"] is None else f"{found['compile_seconds']:.1f}",
        f"{found['first_step_seconds']:.1f}",
        "" if best is None else f"{found['tokens_per_second'] / best:.2f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def draw(report: dict, path: Path) -> None:
    """Bars of the real tokens a second of every side, a panel for each case; whiskers from slowest to fastest."""
    from matplotlib.figure import Figure

    cases = {name: case for name, case in report["cases"].items() if any(map(ran, case["sides"].values()))}
    figure = Figure(figsize=(max(6.0, 3.2 * len(cases)), 4.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(cases)), squeeze=False)[0]
    names = list(dict.fromkeys(name for case in cases.values() for name in case["sides"]))
    for panel, (name, case) in zip(panels, cases.items(), strict=False):
        sides = {side_name: side["summary"] for side_name, side in case["sides"].items() if ran(side)}
        rates = [found["tokens_per_second"] for found in sides.values()]
        below = [found["tokens_per_second"] - found["slowest"] for found in sides.values()]
        above = [found["fastest"] - found["tokens_per_second"] for found in sides.values()]
        colours = [f"C{names.index(side_name)}" for side_name in sides]
        panel.bar(list(sides), rates, yerr=[below, above], capsize=4, color=colours)
        panel.set_title(name)
        panel.tick_params(axis="x", rotation=30)
    panels[0].set_ylabel("real tokens/s")
    figure.suptitle(f"{report['device']['name']}, {report['dtype']}")
    figure.savefig(path, dpi=120)
