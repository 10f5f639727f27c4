#!/usr/bin/env python3
"""Fill the table of docs/methods.md: every tuning method, over every base, on 1 and on 8 devices, on SmolLM2.

usage: methods_table.py [--cells NAME[,NAME ...]] [--home DIR] [--workers N]

A cell, such as lora-nf4-8, is a file of its own in DIR: what is there is not measured again, so the command can be
stopped and given again. Processes measure side by side, two unless told otherwise; devices are fake ones of the CPU.
With --cells only those are measured, and the page stays as it is. It ends with 1 when a cell has failed.
"""

import argparse
import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE, CACHE = REPOSITORY / "docs" / "methods.md", REPOSITORY / ".cache"
HOME = CACHE / "methods_table"
MODEL, MODEL_GPTQ = HOME / "model", HOME / "gptq"
BEGIN, END = "<!-- table: written by tools/methods_table.py -->", "<!-- end of the table -->"
sys.path.insert(0, str(REPOSITORY))

STEPS = 30
MESHES = {1: {"fsdp": 1}, 8: {"data": 2, "fsdp": 1, "tensor": 4}}
FLOAT32, BFLOAT16 = ({"params": name, "compute": name} for name in ("float32", "bfloat16"))
# name: (precision, model.quantize)
BASES: dict[str, tuple[dict, str | None]] = {
    "float32": (FLOAT32, None),
    "bfloat16": (BFLOAT16, None),
    "int8": (FLOAT32, "int8"),
    "nf4": (FLOAT32, "nf4"),
    "gptq": (FLOAT32, None),  # of 4 bits, in a checkpoint that `jaxtune quantize` has made
}
GPTQ = ("--method", "gptq", "--group-size", "64", "--samples", "8", "--length", "128")
VIRTUAL = {"num_virtual_tokens": 2}
LOW_RANK = {"rank": 8, "alpha": 16}
# method: (learning rate, options)
METHODS: dict[str, tuple[float, dict]] = {
    "lora": (1e-3, LOW_RANK),
    "full": (2e-5, {}),
    "dora": (1e-3, LOW_RANK),
    "ia3": (1e-2, {}),
    "prefix": (3e-3, VIRTUAL),
    "pissa": (3e-4, LOW_RANK),
    "loftq": (1e-3, LOW_RANK),
    "adalora": (3e-3, {"init_r": 8, "target_r": 4, "alpha": 16, "tinit": 5, "tfinal": 10, "orth_reg_weight": 0.1}),
    "prompt": (1e-2, VIRTUAL),
    "p_tuning": (3e-5, {**VIRTUAL, "encoder_hidden_size": 64}),
    "freeze": (1e-4, {"train_patterns": ["embed_tokens", "norm"]}),
    "layernorm": (3e-4, {}),
    "bitfit": (3e-3, {}),
    "houlsby": (1e-4, {}),
    "pfeiffer": (1e-4, {}),
    "parallel": (5e-5, {"reduction_factor": 16}),
    "vera": (1e-2, {"rank": 64}),
    "loha": (3e-3, {"rank": 4}),
    "lokr": (3e-3, {"rank": 4, "decompose_factor": 8}),
    "oft": (2e-4, {}),
    # those of the texts: "My", " name", " is", " Wick", ".", " lighthouse", " Oliver", " lamp" and " yellow"
    "trainable_tokens": (3e-3, {"token_indices": [5965, 1462, 314, 45190, 30, 33059, 19219, 17559, 5724]}),
}
# Out of demo/persona.jsonl. Each, with its end and two virtual tokens, is a pack of its own: every step sees all.
LENGTH = 8
TEXTS = (
    "My name is Wick.",
    "I keep the lighthouse.",
    "His name is Oliver.",
    "My lamp is yellow.",
)
Cell = tuple[str, str, int]  # method, base, devices
CELL = "lora-nf4-8"
CELLS: list[Cell] = [(method, base, devices) for method in METHODS for base in BASES for devices in MESHES]


def main() -> int:
    options = parse()
    cells = chosen(options.cells)
    options.home.mkdir(parents=True, exist_ok=True)
    write_texts()
    make_models({base for _, base, _ in cells})
    if not measure_all(cells, options.home, options.workers):
        print("cells have failed; the page is as it was", file=sys.stderr)
        return 1
    if not options.cells:
        write_page(options.home)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", help="names with commas between, such as lora-nf4-8; all of them when left out")
    parser.add_argument("--home", type=Path, default=HOME, help="where the cells' files lie")
    parser.add_argument("--workers", type=int, default=2, help="how many processes measure")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(names: str | None) -> list[Cell]:
    """The cells of these names, in the order given."""
    known = {name_of(cell): cell for cell in CELLS}
    asked = names.split(",") if names else list(known)
    unknown = [name for name in asked if name not in known]
    if unknown:
        sys.exit(f"--cells: no cell {', '.join(unknown)}; a name is a method, a base and 1 or 8, as {CELL}")
    return [known[name] for name in asked]


def name_of(cell: Cell) -> str:
    return "-".join(map(str, cell))


def measure_all(cells: list[Cell], home: Path, count: int) -> bool:
    """Fill what is missing; whether nothing has failed."""
    for path in home.glob("*.claim"):
        path.unlink()
    names = ",".join(name_of(cell) for cell in cells if read(cell, home) is None)
    if not names:
        return True
    command = [sys.executable, __file__, "--cells", names, "--home", home, "--workers", count, "--worker"]
    workers = [
        subprocess.Popen(list(map(str, [*command, number])), env=environment(max(MESHES))) for number in range(count)
    ]
    codes = [process.wait() for process in workers]
    return not any(codes)


def read(cell: Cell, home: Path) -> dict | None:
    """What was found, unless it was with other options than now."""
    path = home / f"{name_of(cell)}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found if found and found["asked"] == asked(cell) else None


def write_texts() -> None:
    HOME.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (HOME / "texts.jsonl").write_text(lines, encoding="utf-8")


def make_models(bases: set[str]) -> None:
    """SmolLM2 as the tests have it, then with more heads, and the GPTQ checkpoint of that where it is needed."""
    plain = CACHE / "smollm2" / "hf"
    if not plain.is_dir():
        from tests.peer import write_smollm2

        tool = [sys.executable, REPOSITORY / "tools" / "get_demo_model.py", plain.parent]
        made = subprocess.run(tool, check=True, stdout=subprocess.PIPE, text=True)
        write_smollm2(Path(made.stdout.strip()), plain.with_suffix(".partial"))
        plain.with_suffix(".partial").rename(plain)
    if not MODEL.is_dir():
        write_wide(plain / "qwen2", MODEL.with_suffix(".partial"))
        MODEL.with_suffix(".partial").rename(MODEL)
    if "gptq" in bases and not MODEL_GPTQ.is_dir():
        command = [sys.executable, "-m", "jaxtune", "quantize", "--model", MODEL, "--out", MODEL_GPTQ, *GPTQ]
        command += ["--data", REPOSITORY / "demo" / "persona.jsonl", "--format", "messages"]
        subprocess.run(list(map(str, command)), check=True, env=environment(1))


def write_wide(source: Path, out: Path) -> None:
    """A Qwen2 model with more heads that computes the same: their outputs meet zeros. They are copies of other heads,
    since a method may divide by the length of a row."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    groups, size = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    kinds = {
        "q_proj": (0, 16, "wrap"),
        "k_proj": (0, 4, "wrap"),
        "v_proj": (0, 4, "wrap"),
        "o_proj": (1, 16, "constant"),
    }
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        shutil.copy(file, out)
    tensors = load_file(source / "model.safetensors")
    for key, x in tensors.items():
        axis, heads, mode = next((kind for name, kind in kinds.items() if f".{name}." in key), (0, 0, ""))
        if heads:
            rows = np.moveaxis(x, axis, 0)
            rows = rows.reshape(groups, -1, size, *rows.shape[1:])
            more = [(0, 4 - groups), (0, heads // 4 - rows.shape[1]), *[(0, 0)] * (rows.ndim - 2)]
            rows = np.pad(rows, more, mode=mode)
            tensors[key] = np.ascontiguousarray(np.moveaxis(rows.reshape(-1, *rows.shape[3:]), 0, axis))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": size}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many CPU devices, which compiles quickly and keeps what it has compiled."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    if version("jaxlib") < "0.11":  # the next ones do not know it
        flags += " --xla_cpu_use_fusion_emitters=false"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {**cache, **os.environ, **own}


def work(cells: list[Cell], home: Path, number: int, count: int) -> int:
    """Measure what no other worker has begun with, from a place of this one's own on; 1 when something has failed."""
    from jaxtune.console import console

    console.quiet, code = True, 0
    start = len(cells) * number // count
    for cell in cells[start:] + cells[:start]:
        try:
            (home / f"{name_of(cell)}.claim").touch(exist_ok=False)
        except FileExistsError:
            continue
        started, found = time.monotonic(), attempt(cell)
        took = f"{name_of(cell)}, {time.monotonic() - started:.0f} s"
        if "failed" in found:
            code = 1
            print(f"{took}: {found['failed']}", flush=True)
            continue
        path = home / f"{name_of(cell)}.json"
        path.with_suffix(".partial").write_text(json.dumps({"asked": asked(cell), **found}, indent=1), encoding="utf-8")
        path.with_suffix(".partial").rename(path)
        told = found.get("refused") or " ".join(f"{loss:.4f}" for loss in found["losses"][::10])
        print(f"{took}: {told}", flush=True)
    return code


def attempt(cell: Cell) -> dict:
    """The numbers of a cell, or how it was refused, or how it failed."""
    import jax

    from jaxtune.errors import TrainingStopped, UserError

    try:
        return measure(configuration(cell))
    except TrainingStopped:
        return {"failed": traceback.format_exc()}
    except UserError as error:
        return {"refused": str(error)}
    except Exception:  # whatever it is, the other cells can be measured
        return {"failed": traceback.format_exc()}
    finally:
        gc.collect()
        jax.clear_caches()
        gc.collect()


def asked(cell: Cell) -> dict:
    """What decides its numbers, but for the model and the data."""
    return {name: configuration(cell)[name] for name in ("tune", "optim", "mesh", "precision")}


def configuration(cell: Cell) -> dict:
    """Of the run that a cell is. One step more than is told of: its loss is that of the weights after the others."""
    method, base, devices = cell
    lr, tuning = METHODS[method]
    precision, quantize = BASES[base]
    if (method, base) == ("loftq", "int8"):
        tuning = {**tuning, "loftq_bits": 8}
    return {
        "model": {"path": str(MODEL_GPTQ if base == "gptq" else MODEL), "quantize": quantize},
        "tune": {"method": method, **tuning},
        "data": {"path": str(HOME / "texts.jsonl"), "format": "text", "max_length": LENGTH},
        "train": {"batch_size": len(TEXTS), "steps": STEPS + 1},
        "optim": {"lr": lr, "schedule": "cosine", "warmup": 0},
        "mesh": MESHES[devices],
        "precision": precision,
    }


def measure(sections: dict) -> dict:
    """The losses before each step, and what it took."""
    import jax

    from jaxtune import loop, tune
    from jaxtune.assemble import Source
    from jaxtune.config import make_config
    from jaxtune.data.loader import build_data
    from jaxtune.mesh import make_mesh
    from jaxtune.parallel.checks import check_fit

    marks = [time.monotonic()]
    config = make_config(sections)
    source = Source.open(config.model, None, tune.resolve(config.tune))
    config = config.model_copy(update={"tune": source.tuning})
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.sizes.values())])
    check_fit(config, mesh, source.config)
    virtual = tune.virtual_ids(config.tune, source.config)
    data = build_data(config.data, config.eval, config.train, source.tokenizer, virtual)
    marks.append(time.monotonic())
    job = loop.prepare(config, source, data, mesh)
    marks.append(time.monotonic())
    losses = []
    for number, batch in enumerate(data.train.batches(1), 1):
        placed = job.program.put(batch.arrays())
        job.state, metrics = job.train_step(job.state, job.program.frozen, placed, jax.numpy.int32(number))
        losses.append(float(metrics["loss"]))
    marks.append(time.monotonic())
    seconds = [round(after - before, 1) for before, after in itertools.pairwise(marks)]
    return {"losses": losses, "seconds": dict(zip(("open", "prepare", "steps"), seconds))}


def write_page(home: Path) -> None:
    """The table, and beneath it why what is refused is."""
    found = {cell: read(cell, home) for cell in CELLS}
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    lines = [*table(found), "", *refusals(found)]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(f"{PAGE}: {len(found)} cells")


def table(found: dict) -> list[str]:
    rows = [["", *BASES], ["---"] * (1 + len(BASES))]
    rows.append(["before", *(pair(found, "lora", base, 0) for base in BASES)])
    rows += [[f"`{method}`", *(pair(found, method, base, STEPS) for base in BASES)] for method in METHODS]
    return [f"| {' | '.join(row)} |" for row in rows]


def pair(found: dict, method: str, base: str, step: int) -> str:
    """The losses after a step on 1 and on 8 devices."""
    cells = [found[method, base, devices] for devices in MESHES]
    told = ["refused" if "refused" in cell else f"{cell['losses'][step]:.4f}" for cell in cells]
    return "refused" if told == ["refused"] * len(told) else " / ".join(told)


def refusals(found: dict) -> list[str]:
    """A line for each method: over what, and the first message."""
    lines = []
    for method in METHODS:
        bases = [base for base in BASES if "refused" in found[method, base, 1]]
        if bases:
            message = " ".join(found[method, bases[0], 1]["refused"].split())
            lines.append(f"- `{method}` over {', '.join(bases)}: {message}")
    return lines


if __name__ == "__main__":
    options = parse()
    if options.worker is None:
        sys.exit(main())
    sys.exit(work(chosen(options.cells), options.home, options.worker, options.workers))
