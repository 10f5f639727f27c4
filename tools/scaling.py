#!/usr/bin/env python3
"""Predict by counting how the training step of Llama-2-7B's shape scales: no device is there and nothing is measured.

usage: scaling.py [--ways NAME ...] [--devices N ...] [--home DIR] [--json FILE] [--svg FILE] [--page FILE]

For each way to lay the step over 8, 64 and 512 devices the step of `jaxtune train` is compiled for as many devices of
a CPU, from shapes, in a process of its own. FLOPs, collectives and their bytes are read off it as `jaxtune plan` does;
stated rates make seconds of them. What was counted lies under --home, so the command can be stopped and given again.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tools.scaling_count import Count, Traffic, count_step  # noqa: E402

BEGIN, END = "<!-- table: written by tools/scaling.py -->", "<!-- end of the table -->"

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "architectures": ["LlamaForCausalLM"],
}
TOKENS = 8192  # of a device in a step, on any number of devices: weak scaling
LENGTH = 4096
SIZES = (8, 64, 512)
BLOCK = {"remat": "block"}
# Tensor and context stay within a machine of eight, where the wires are fastest; fsdp takes what is left.
WAYS: dict[str, dict] = {
    "data": {"mesh": {"data": -1, "fsdp": 1}, "memory": BLOCK},
    "fsdp": {"mesh": {"fsdp": -1}, "memory": BLOCK},
    "tensor": {"mesh": {"tensor": 8, "fsdp": -1, "sequence_parallel": True}, "memory": BLOCK},
    # A stage computes its forward again anyhow: remat none does it once, as `block` does elsewhere.
    "pipe": {"mesh": {"pipe": 8, "fsdp": -1, "zero": 1}, "train": {"micro_batches": 16}, "memory": {"remat": "none"}},
    # A sequence has the tokens of all eight.
    "context": {"mesh": {"context": 8, "fsdp": -1}, "data": {"max_length": 8 * TOKENS}, "memory": BLOCK},
}


@dataclass(frozen=True)
class Rates:
    """Of one device: matmul operations a second that it reaches; bytes a second that it sends round a ring in its own
    machine, to one neighbour there, and through its own port to another machine."""

    flops: float
    near: float
    hop: float
    far: float


# NVIDIA's data sheets: H100 SXM, 989 TFLOP/s of dense bfloat16, of which a half; NVLink 4, 900 GB/s both ways together;
# a ConnectX-7 port of 400 Gbit/s for each GPU, as in a DGX H100.
H100 = Rates(flops=0.5 * 989e12, near=450e9, hop=450e9, far=50e9)
# Google's page of the v5p: 459 TFLOP/s, of which a half; 1,200 GB/s both ways together over the six links of a torus of
# three dimensions, of which a ring has the two of one dimension. All 512 chips are in one slice: there is no far.
V5P = Rates(flops=0.5 * 459e12, near=200e9, hop=100e9, far=200e9)
CARDS = {"H100": H100, "TPU v5p": V5P}


def seconds(one: Traffic, rates: Rates) -> float:
    """Of a step, no two transfers at once, latency left out.

    The ring algorithms (Patarasuk and Yuan 2009; NCCL's `busbw`) send (n-1)/n of the buffer from each of n devices
    for an all-gather or a reduce-scatter, and twice that for an all-reduce. A ring enters and leaves a machine
    once; with `members` rings, each with a part of the data and a port of its own, all their ports are used. A
    permutation has one path for each device: where one leaves the machine, all wait for its one port.
    """
    is_ring = one.kind not in ("collective-permute", "all-to-all")
    near, ports = (rates.near, one.members) if is_ring else (rates.hop, 1)
    return one.sent / (min(near, ports * rates.far) if one.crosses else near)


def efficiency(count: Count, rates: Rates) -> tuple[float, float]:
    """The share of its time that a device does what one alone would: (nothing overlapped, all that can be).

    alone / (compute + sent), and alone / (max(compute, sent that can wait) + sent along tensor), with compute =
    flops / (rate x (1 - bubble)). Along tensor the next matmul needs what is sent; weights can be fetched ahead,
    gradients and stages' outputs sent behind, and keys passed on while they are used.
    """
    alone = count.alone / rates.flops
    compute = count.flops / rates.flops / (1 - count.bubble)
    needed = sum(seconds(one, rates) for one in count.traffic if "tensor" in one.axes)
    rest = sum(seconds(one, rates) for one in count.traffic) - needed
    return alone / (compute + needed + rest), alone / (max(compute, rest) + needed)


def settings(way: str, devices: int):
    """The configuration of a way, with TOKENS for each device."""
    from jaxtune.config import make_config

    own = WAYS[way]
    data = {"path": "none.json", "max_length": LENGTH, **own.get("data", {})}
    train = {"batch_size": TOKENS * devices // data["max_length"], **own.get("train", {})}
    precision = {"params": "float32", "compute": "bfloat16"}
    tree = {"model": {"path": "none"}, "tune": {"method": "full"}, "data": data, "train": train}
    return make_config({**tree, "mesh": own["mesh"], "memory": own["memory"], "precision": precision})


def count(way: str, devices: int) -> Count:
    """Of a way, in this process, which must not have used JAX before."""
    from jaxtune.models.families import parse_config
    from jaxtune.plan.target import choose

    here = choose("cpu", devices).devices
    return count_step(way, settings(way, devices), parse_config(LLAMA_2_7B), here)


def main() -> int:
    options = parse()
    if options.one:
        way, devices = options.one
        (options.home / f"{way}-{devices}.json").write_text(json.dumps(asdict(count(way, int(devices)))))
        return 0
    options.home.mkdir(parents=True, exist_ok=True)
    counts = [counted(way, devices, options.home) for way in options.ways for devices in options.devices]
    lines = table(counts)
    print("\n".join(lines))
    if options.json:
        options.json.write_text(dumped(counts), encoding="utf-8")
    if options.svg:
        draw(counts, options.svg)
    if options.page:
        before, rest = options.page.read_text(encoding="utf-8").split(BEGIN)
        text = "\n".join([f"{before}{BEGIN}", *lines, f"{END}{rest.split(END)[1]}"])
        options.page.write_text(text, encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--devices", nargs="+", type=int, default=SIZES)
    parser.add_argument("--home", type=Path, default=REPOSITORY / ".cache" / "scaling", help="where the counts lie")
    parser.add_argument("--json", type=Path, help="the counts of all rows")
    parser.add_argument("--svg", type=Path, help="the picture")
    parser.add_argument("--page", type=Path, help="a page whose table is to be written anew")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def counted(way: str, devices: int, home: Path) -> Count:
    """The row that is there, or one from a process of its own: how many devices a CPU has is settled once."""
    path = home / f"{way}-{devices}.json"
    if not path.exists():
        print(f"compiling {way} for {devices} devices ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--home", str(home), "--one", way, str(devices)]
        subprocess.run(command, check=True)
    return Count.of(json.loads(path.read_text(encoding="utf-8")))


def dumped(counts: list[Count]) -> str:
    """A line for each row."""
    return "[\n" + ",\n".join(json.dumps(asdict(one)) for one in counts) + "\n]\n"


def table(counts: list[Count]) -> list[str]:
    """Markdown. What is under 10 MB is left out."""
    names = ["mesh", "devices", "state GB", "TFLOP", "collectives: times, GB sent", "bubble", *CARDS]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for one in counts:
        sent = "<br>".join(told(row) for row in one.traffic if row.sent >= 1e7)
        mesh = ", ".join(f"{axis} {size}" for axis, size in one.mesh.items())
        bubble = f"{one.bubble:.0%}" if one.bubble else ""
        bands = ["{:.0%} to {:.0%}".format(*efficiency(one, rates)) for rates in CARDS.values()]
        cells = [mesh, one.devices, f"{one.state / 1e9:.1f}", f"{one.flops / 1e12:.0f}", sent, bubble, *bands]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def told(row: Traffic) -> str:
    where = f", {row.members} a machine" if row.crosses else ""
    axes = " x ".join(row.axes) or "other groups"
    return f"{row.kind} {axes} {row.devices}{where}, {row.dtype}: {row.times:,}, {row.sent / 1e9:.2f}"


def draw(counts: list[Count], path: Path) -> None:
    """A band for each way, between nothing overlapped and all that can be; a row of them for each card."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Text stays text, and nothing depends on the day: a small file that changes only with its numbers.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 9})
    figure, rows = pyplot.subplots(len(CARDS), len(WAYS), figsize=(10, 5), sharex=True, sharey=True)
    for panels, (card, rates) in zip(rows, CARDS.items(), strict=True):
        for panel, way in zip(panels, WAYS, strict=True):
            draw_band(panel, [one for one in counts if one.way == way], rates)
        panels[0].set_ylabel(f"{card}: efficiency")
    for panel, way in zip(rows[0], WAYS, strict=True):
        panel.set_title(way)
    for panel in rows[-1]:
        panel.set_xlabel("devices")
    rows[0][0].legend(frameon=False, loc="lower left", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_band(panel, counts: list[Count], rates: Rates) -> None:
    devices = [one.devices for one in counts]
    apart, hidden = zip(*(efficiency(one, rates) for one in counts), strict=True) if counts else ((), ())
    panel.fill_between(devices, apart, hidden, alpha=0.3, linewidth=0)
    panel.plot(devices, apart, marker="o", markersize=3, label="nothing overlapped")
    panel.plot(devices, hidden, marker="o", markersize=3, label="all that can be")
    panel.set(xscale="log", ylim=(0, 1.05))
    panel.set_xticks(SIZES, labels=[str(size) for size in SIZES])
    panel.minorticks_off()


if __name__ == "__main__":
    sys.exit(main())
