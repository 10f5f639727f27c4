#!/usr/bin/env python3
"""jaxtune beside Transformers' Trainer with PEFT, TRL and others, on the same rows, one command.

usage: bench.py [--cases PATTERNS] [--sides PATTERNS] [--rounds N] [--steps N] [--data FILE --format F --system TEXT]
                [--tokenizer DIR] [--ours section.key=value] [--jax-peer NAME=PYTHON] [--timeout SECONDS]
                [--dtype TYPE] [--json FILE] [--png FILE] [--list]

A case is a model, a method and rows (tools/bench_peers/cases.py; `--list` prints them). Every side of it runs in a
process of its own, once a round, in turns whose order is reversed every other round, so that the machine's noise falls
on all alike. On a CPU everything is computed in float32, on a GPU in bfloat16, unless --dtype says otherwise; in
bfloat16 the frozen weights below an adapter are held in it, too.

A real token is one of a conversation's own, not padding; a supervised one is one that the loss is on. The side
jaxtune-shared has data.share_prefix: what all conversations begin with is computed once a pack, and counted for each,
for each has the loss and the gradients that it would have by itself. The model's FLOPs of a real token
are jaxtune.plan.flops.model_flops, the same number for every side: per matmul weight 2 forward, 2 for the gradient of
its input and, where it trains, 2 for its own, hence 4 with LoRA and 6 with full tuning; attention over the row that a
token stands in; the head for every token, also where a side computes it for the supervised alone; nothing that is
computed twice. The share is that of what the device does in one large matmul, measured in the same rounds, the best of
them. Peak memory is the process's own (a GPU's: of its arrays) until the last step. Times begin with the process:
compiled programs are not kept from one to the next. A side that fails is shown with its last words, and the exit code
is 1; one that cannot run here is shown with the reason.
"""

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HOME = REPOSITORY / ".cache" / "bench"
BESIDE = REPOSITORY.parent / "shared"  # real data that may lie beside a checkout
sys.path.insert(0, str(REPOSITORY))

from tools.bench_peers import report as reporting  # noqa: E402
from tools.bench_peers.cases import CASES, OURS, SCRIPTS, SIDES, WARM, Case, Side, jax_peer  # noqa: E402

SHAPE = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "hidden_act": "silu",
}
LORA = {"rank": 8, "alpha": 32, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}
PACKAGES = ("jax", "torch", "transformers", "peft", "trl", "liger_kernel", "bitsandbytes", "flash_attn")


def main() -> int:
    options = parse()
    if options.list:
        print("\n".join(f"{name:14} {told(case)}" for name, case in CASES.items()))
        return 0
    HOME.mkdir(parents=True, exist_ok=True)
    device = run(SCRIPTS / "matmul.py", *filter(None, [options.dtype]))
    on_gpu = device["platform"] != "cpu"
    report = {
        "device": device,
        "dtype": device.pop("dtype"),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "ours": options.ours,
        "cases": {},
    }
    failed = []
    for name in matching(CASES, options.cases):
        if on_gpu or not CASES[name].gpu_only:
            try:
                measure(name, options, report)
            except Failed as error:
                failed.append(f"{name}, before its sides ran: {error}")
            write(report, options)
    print("\n".join(["", reporting.table(report), *failed]))
    sides = [side for case in report["cases"].values() for side in case["sides"].values()]
    return int(bool(failed) or any(side["failed"] for side in sides))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="lora", help="patterns of names, with commas between them")
    parser.add_argument("--sides", default="*", help="likewise; without --jax-peer's, which always run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="timed steps of a round; the case's own when left out")
    real = BESIDE / "data" / "huanhuan.json"
    parser.add_argument("--data", type=Path, help=f"rows; {real.name} where it lies beside the checkout, else demo/'s")
    parser.add_argument("--format", choices=["alpaca", "messages"], default="messages", help="of --data")
    parser.add_argument("--system", help="first message of every conversation of --data")
    parser.add_argument("--tokenizer", help="directory or .gguf; Qwen2.5's beside the checkout, else the demo model's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="what every side computes in")
    parser.add_argument("--ours", action="append", default=[], metavar="KEY=VALUE", help="a setting of jaxtune's")
    parser.add_argument("--jax-peer", action="append", default=[], type=jax_peer, metavar="NAME=PYTHON")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that a side may take in a round")
    parser.add_argument("--json", type=Path, help="where to write the numbers, after every case")
    parser.add_argument("--png", type=Path, help="where to draw them")
    parser.add_argument("--list", action="store_true", help="print the cases")
    options = parser.parse_args(arguments)
    if options.data is None and real.exists():
        options.data, options.format, options.system = real, "alpaca", "现在你要扮演皇帝身边的女人--甄嬛"
    options.data = (options.data or REPOSITORY / "demo" / "persona.jsonl").resolve()
    words = BESIDE / "assets" / "qwen2.5-tokenizer"
    options.tokenizer = options.tokenizer or (str(words) if words.exists() else None)
    for name in ("cases", "sides"):
        if not matching({"cases": CASES, "sides": SIDES}[name], getattr(options, name)):
            parser.error(f"--{name}: nothing matches {getattr(options, name)}")
    return options


def matching(names, patterns: str) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns.split(","))]


def told(case: Case) -> str:
    """`lora, 0.5B, conversations of 384`."""
    return f"{case.method}, {case.shape}, {case.says} of {case.length}" + ", on a GPU" * case.gpu_only


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure(name: str, options: argparse.Namespace, report: dict) -> None:
    """Run the rounds of a case, and put what they found into the report."""
    case, on_gpu = CASES[name], report["device"]["platform"] != "cpu"
    home = HOME / name
    home.mkdir(exist_ok=True)
    spec = home / "spec.json"
    spec.write_text(json.dumps(specification(case, home, options, on_gpu, report["dtype"]), indent=1))
    sides = {
        side: SIDES[side]
        for side in matching(SIDES, options.sides)
        if (on_gpu or not SIDES[side].gpu_only) and not (case.blocks and SIDES[side].conversations_only)
    }
    sides |= dict(options.jax_peer)
    found = {
        side: {"why": missing(SIDES[side].needs) if side in SIDES else None, "failed": False, "rounds": []}
        | {"is_torch": sides[side].is_torch}
        for side in sides
    }
    prepared = prepare(case, home, options)
    report["cases"][name] = {"says": told(case), **prepared, "spec": json.loads(spec.read_text()), "sides": found}
    for number in range(options.rounds):
        for side in list(sides)[:: -1 if number % 2 else 1]:
            if found[side]["why"] is None:
                take_turn(sides[side], found[side], spec, home / f"{side}.log", options.timeout)
                print(f"{name}, round {number + 1}, {side}: {said(found[side])}", flush=True)
        again = run(SCRIPTS / "matmul.py", report["dtype"])
        report["device"]["matmul_flops"] = max(report["device"]["matmul_flops"], again["matmul_flops"])
    reporting.summarise(report, OURS)


def specification(case: Case, home: Path, options: argparse.Namespace, on_gpu: bool, dtype: str) -> dict:
    """What every side reads (bench_peers/common.py); jaxtune's own configuration is written beside it."""
    model = str(HOME / "models" / case.shape)
    common = {"method": case.method, "length": case.length, "batch": case.batch[on_gpu], "warm": WARM}
    data = {"path": str(options.data), "format": options.format, "system": options.system}
    blocks = {"path": str(home / "blocks"), "format": "megatron"}
    shared = {"max_length": case.length, "cache": str(HOME / "tokens")}
    tune = {"method": "full"} if case.method == "full" else {"method": "lora", **LORA}
    batches = {"batch_size": case.batch[on_gpu], "micro_batches": 1 if on_gpu else case.micro_batches}
    config = {
        "precision": {"compute": dtype, "params": "float32" if case.method == "full" else dtype},
        "model": {"path": model} | ({"quantize": "nf4"} if case.method == "qlora" else {}),
        "tune": tune,
        "train": {"output_dir": str(home / "run"), **batches},
        "memory": {"unroll": on_gpu},  # as a run of more steps has it
        "checkpoint": {"resume": "never"},
        "log": {"every": 1},
    }
    (home / "config.json").write_text(json.dumps(config | {"data": shared | (blocks if case.blocks else data)}))
    (home / "conversations.json").write_text(json.dumps(config | {"data": shared | data}))
    return common | {
        "model": model,
        "rows": str(home / "rows.json"),
        "steps": options.steps or case.steps[on_gpu],
        "dtype": dtype,
        "lora": LORA,
        "device": "gpu" if on_gpu else "cpu",
        "blocks": case.blocks,
        "checkpointing": case.checkpointing,
        "jaxtune": str(home / "config.json"),
        "overrides": options.ours,
    }


def prepare(case: Case, home: Path, options: argparse.Namespace) -> dict:
    """The model and the rows of a case; {"flops_per_token", "num_rows", "tokens_per_row"}."""
    words = options.tokenizer if case.shape != "smollm2" else None
    plan = {
        "shape": case.shape,
        "words": words or demo_model(),
        "config": str(home / "config.json"),
        "conversations": str(home / "conversations.json") if case.blocks else None,
        "rows": str(home / "rows.json"),
    }
    (home / "plan.json").write_text(json.dumps(plan))
    return run(SCRIPTS / "prepare.py", home / "plan.json")


def demo_model() -> str:
    done = subprocess.run([sys.executable, REPOSITORY / "tools" / "get_demo_model.py"], capture_output=True, text=True)
    return done.stdout.strip() or sys.exit(done.stderr)


def missing(packages: tuple[str, ...]) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def take_turn(side: Side, found: dict, spec: Path, log: Path, timeout: float) -> None:
    """Run a side once, and add its answer, or why there is none."""
    try:
        found["rounds"].append(run(side.script, spec, *side.options, python=side.python, log=log, timeout=timeout))
    except Failed as error:
        found |= {"why": f"failed: {error}", "failed": True}


class Failed(Exception):
    """A process ended without an answer; its last words."""


def run(script: Path, *arguments, python: str = sys.executable, log: Path | None = None, timeout: float = 3600) -> dict:
    """A script in a process of its own; what it printed last, as JSON. log: where to keep all that it printed.

    Raises:
        Failed: it did not end well, or in time.
    """
    process = subprocess.Popen(
        [python, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment(),
    )
    end_first(process.pid)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Failed(f"took more than {timeout:g} s") from None
    if log:
        log.write_text(err + out)
    with contextlib.suppress(IndexError, ValueError):
        if process.returncode == 0:
            return json.loads(out.strip().splitlines()[-1])
    raise Failed(last_words(process.returncode, err.strip() or out.strip()))


def environment() -> dict[str, str]:
    """Of a side: one GPU, no network, and nothing compiled before."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return {"CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **kept}


def end_first(pid: int) -> None:
    """Where memory runs out, Linux is to end this process, not one beside it."""
    with contextlib.suppress(OSError):  # another system, or the process is gone
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def last_words(code: int, text: str) -> str:
    words = text.splitlines()[-1][:200].replace("|", "/") if text else "not a word"
    return f"killed by signal {-code}, perhaps for its memory" if code < 0 else words


def said(side: dict) -> str:
    if side["why"]:
        return side["why"]
    last = side["rounds"][-1]
    return f"{last['tokens'] / last['seconds']:,.1f} tokens/s, {last['peak_gb']:.1f} GB"


def write(report: dict, options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    if options.png:
        reporting.draw(report, options.png)


if __name__ == "__main__":
    sys.exit(main())
