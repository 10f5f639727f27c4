"""What the benchmark can measure, by name, and the sides that it measures."""

import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    """A model, a method and rows.

    The two numbers of batch and steps are a CPU's and a GPU's. Conversations are packed to `length` where a side packs.
    """

    says: str
    shape: str  # 0.5B, 7B or smollm2
    method: str  # lora, qlora or full
    length: int  # tokens of a pack or block
    batch: tuple[int, int]
    steps: tuple[int, int]  # timed ones
    blocks: bool = True  # rows of `length` tokens, all of them supervised; else conversations
    checkpointing: bool = False  # the torch sides need it to fit
    gpu_only: bool = False
    micro_batches: int = 1  # of jaxtune's step on a CPU; as many as packs: one at a time, as the Trainer accumulates


def conversations(shape: str, method: str, steps: int, micro_batches: int = 1) -> Case:
    return Case("conversations", shape, method, 384, (2, 16), (steps, 20), blocks=False, micro_batches=micro_batches)


# A pack at a time needs less memory and is no slower, but where layers are as narrow as SmolLM2's. Full tuning would
# have to sum the gradients of all weights.
CASES = {
    "lora": conversations("0.5B", "lora", 6, micro_batches=2),
    "qlora": conversations("0.5B", "qlora", 6, micro_batches=2),
    "full": conversations("0.5B", "full", 4),
    "smollm2-lora": conversations("smollm2", "lora", 12),
    "smollm2-full": conversations("smollm2", "full", 8),
    "lora-256": Case("blocks", "0.5B", "lora", 256, (1, 32), (12, 20)),
    "lora-512": Case("blocks", "0.5B", "lora", 512, (1, 16), (8, 20)),
    "lora-2048": Case("blocks", "0.5B", "lora", 2048, (1, 8), (3, 20)),
    "lora-4096": Case("blocks", "0.5B", "lora", 4096, (1, 4), (2, 20), checkpointing=True),
    "qlora-2048": Case("blocks", "0.5B", "qlora", 2048, (1, 8), (3, 20)),
    "full-256": Case("blocks", "0.5B", "full", 256, (1, 32), (8, 20)),
    "full-2048": Case("blocks", "0.5B", "full", 2048, (1, 8), (3, 20)),
    "lora-7b": Case("blocks", "7B", "lora", 2048, (1, 4), (1, 12), checkpointing=True, gpu_only=True),
    "qlora-7b": Case("blocks", "7B", "qlora", 2048, (1, 4), (1, 12), checkpointing=True, gpu_only=True),
}
WARM = 2  # steps before the clock starts


@dataclass(frozen=True)
class Side:
    """A script and the interpreter that runs it."""

    script: Path
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # packages of this interpreter
    is_torch: bool = False
    gpu_only: bool = False
    conversations_only: bool = False
    python: str = sys.executable


PEFT = ("torch", "peft", "accelerate")
TRL = (*PEFT, "trl", "datasets")
OURS = "jaxtune"
SIDES = {
    OURS: Side(SCRIPTS / "ours.py"),
    f"{OURS}-shared": Side(SCRIPTS / "ours.py", ("--share-prefix",), conversations_only=True),
    "trainer": Side(SCRIPTS / "trainer.py", (), PEFT, True),
    "trl": Side(SCRIPTS / "trl_packed.py", (), TRL, True),
    "trainer-compile": Side(SCRIPTS / "trainer.py", ("--compile",), PEFT, True, gpu_only=True),
    "trainer-liger": Side(SCRIPTS / "trainer.py", ("--liger",), (*PEFT, "liger_kernel"), True, gpu_only=True),
    "trl-liger": Side(SCRIPTS / "trl_packed.py", ("--liger",), (*TRL, "liger_kernel"), True, gpu_only=True),
}


def jax_peer(option: str) -> tuple[str, Side]:
    """NAME=/path/to/python, a JAX peer with an interpreter of its own; its script is NAME.py here."""
    name, _, python = option.partition("=")
    scripts = sorted(path.stem for path in SCRIPTS.glob("*.py"))
    if not python or name not in scripts or name in SIDES:
        raise ValueError(f"expected NAME=PYTHON with a script NAME.py in {SCRIPTS.name}/, found {option!r}")
    return name, Side(SCRIPTS / f"{name}.py", python=python)
