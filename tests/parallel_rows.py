"""The rows of the table in docs/parallelism.md: a mesh, options and a tuning method each.

tests/test_parallel_table.py runs them, and tools/parallel_docs.py writes down what it found.
"""

from tests.programs import FULL, LORA

FREEZE = {"method": "freeze", "freeze_first": 2, "freeze_embedding": True}


def row(tune=FULL, micro=1, memory=None, optim=None, **mesh):
    """sections of a configuration; axes that are not named have size 1."""
    sections = {"tune": tune, "mesh": {"fsdp": 1, **mesh}, "train": {"micro_batches": micro, "batch_size": 16}}
    return {**sections, **({"memory": memory} if memory else {}), **({"optim": optim} if optim else {})}


ROWS = {
    # each axis alone
    "data 8": row(data=8),
    "data 8, LoRA": row(LORA, data=8),
    "fsdp 8, zero 0": row(fsdp=8, zero=0),
    "fsdp 8, zero 1": row(fsdp=8, zero=1),
    "fsdp 8, zero 2": row(fsdp=8, zero=2),
    "fsdp 8, zero 2, 2 micro-batches": row(fsdp=8, zero=2, micro=2),
    "fsdp 8, zero 3": row(fsdp=8),
    "fsdp 8, zero 3, LoRA": row(LORA, fsdp=8),
    "tensor 8": row(tensor=8),
    "tensor 8, LoRA": row(LORA, tensor=8),
    "tensor 4, sequence parallel": row(tensor=4, sequence_parallel=True),
    "tensor 4, sequence parallel, LoRA": row(LORA, tensor=4, sequence_parallel=True),
    "context 4, ring": row(context=4),
    "context 8, ring, LoRA": row(LORA, context=8),
    "context 4, ulysses": row(context=4, context_attention="ulysses"),
    "context 4, ulysses, LoRA": row(LORA, context=4, context_attention="ulysses"),
    "pipe 4, gpipe": row(pipe=4, micro=8, schedule="gpipe"),
    "pipe 4, 1f1b": row(pipe=4, micro=8),
    "pipe 4, 1f1b, LoRA": row(LORA, pipe=4, micro=8),
    "pipe 3, 1f1b, 4 layers": row(pipe=3, micro=4),
    "pipe 2, interleaved": row(pipe=2, micro=4, schedule="interleaved", virtual_stages=2),
    "pipe 2, interleaved, LoRA": row(LORA, pipe=2, micro=4, schedule="interleaved", virtual_stages=2),
    "pipe 2, 1f1b, first 2 layers frozen": row(FREEZE, pipe=2, micro=4),
    # pairs
    "data 2, fsdp 4 (hybrid)": row(data=2, fsdp=4),
    "data 2, fsdp 4, zero 1": row(data=2, fsdp=4, zero=1),
    "data 2, fsdp 4, zero 2, 2 micro-batches": row(data=2, fsdp=4, zero=2, micro=2),
    "data 2, tensor 4": row(data=2, tensor=4),
    "data 2, context 4": row(data=2, context=4),
    "data 2, pipe 4": row(data=2, pipe=4, micro=4),
    "fsdp 4, tensor 2": row(fsdp=4, tensor=2),
    "fsdp 4, tensor 2, LoRA": row(LORA, fsdp=4, tensor=2),
    "fsdp 2, context 4": row(fsdp=2, context=4),
    "fsdp 2, pipe 4": row(fsdp=2, pipe=4, micro=4),
    "fsdp 2, pipe 4, zero 1": row(fsdp=2, pipe=4, micro=4, zero=1),
    "fsdp 2, pipe 4, zero 2": row(fsdp=2, pipe=4, micro=4, zero=2),
    "tensor 2, context 4": row(tensor=2, context=4),
    "tensor 2, context 2, ulysses, sequence parallel": row(
        tensor=2, context=2, context_attention="ulysses", sequence_parallel=True
    ),
    "tensor 2, pipe 4": row(tensor=2, pipe=4, micro=4),
    "tensor 2, pipe 2, sequence parallel": row(tensor=2, pipe=2, micro=4, sequence_parallel=True),
    "context 2, pipe 2, ring": row(context=2, pipe=2, micro=4),
    "context 2, pipe 3, ring, 4 layers": row(context=2, pipe=3, micro=4),
    "context 2, pipe 2, ulysses": row(context=2, pipe=2, micro=4, context_attention="ulysses"),
    # three at once
    "data 2, fsdp 2, tensor 2": row(data=2, fsdp=2, tensor=2),
    "data 2, fsdp 2, context 2": row(data=2, fsdp=2, context=2),
    "data 2, fsdp 2, pipe 2": row(data=2, fsdp=2, pipe=2, micro=2),
    "data 2, tensor 2, context 2": row(data=2, tensor=2, context=2),
    "data 2, tensor 2, pipe 2": row(data=2, tensor=2, pipe=2, micro=4),
    "data 2, context 2, pipe 2": row(data=2, context=2, pipe=2, micro=4),
    "fsdp 2, tensor 2, context 2": row(fsdp=2, tensor=2, context=2, sequence_parallel=True),
    "fsdp 2, tensor 2, pipe 2": row(fsdp=2, tensor=2, pipe=2, micro=4),
    "fsdp 2, tensor 2, pipe 2, interleaved, LoRA": row(
        LORA, fsdp=2, tensor=2, pipe=2, micro=4, schedule="interleaved", virtual_stages=2
    ),
    "fsdp 2, context 2, pipe 2": row(fsdp=2, context=2, pipe=2, micro=4),
    "tensor 2, context 2, pipe 2": row(tensor=2, context=2, pipe=2, micro=4),
    "tensor 2, context 2, pipe 2, LoRA": row(LORA, tensor=2, context=2, pipe=2, micro=4),
    # memory, on one device and on a mesh
    "remat none": row(memory={"remat": "none"}),
    "remat dots": row(memory={"remat": "dots"}),
    "remat by name": row(memory={"remat": ["after_attention"]}),
    "remat block": row(memory={"remat": "block"}),
    "remat full": row(memory={"remat": "full"}),
    "unrolled": row(memory={"unroll": True}),
    "fsdp 4, tensor 2, remat full, unrolled": row(fsdp=4, tensor=2, memory={"remat": "full", "unroll": True}),
    "pipe 2, fsdp 2, unrolled, LoRA": row(LORA, pipe=2, fsdp=2, micro=4, memory={"unroll": True}),
    "fsdp 4, remat none": row(fsdp=4, memory={"remat": "none"}),
    "fsdp 4, tensor 2, remat full": row(fsdp=4, tensor=2, memory={"remat": "full"}),
    "pipe 2, fsdp 2, remat block": row(pipe=2, fsdp=2, micro=4, memory={"remat": "block"}),
    "fsdp 4, offload optimizer": row(fsdp=4, memory={"offload": ["optimizer"]}),
    "fsdp 4, offload activations": row(fsdp=4, memory={"offload": ["activations"]}),
    "fsdp 4, offload params": row(fsdp=4, memory={"offload": ["params"]}),
    "fsdp 4, offload params, LoRA": row(LORA, fsdp=4, memory={"offload": ["params"]}),
    "fsdp 2, pipe 2, offload all": row(
        fsdp=2, pipe=2, micro=4, memory={"offload": ["params", "optimizer", "activations"]}
    ),
    "tensor 2, offload all, LoRA": row(LORA, tensor=2, memory={"offload": ["params", "optimizer", "activations"]}),
    "fsdp 8, zero 2, Adafactor": row(fsdp=8, zero=2, optim={"name": "adafactor"}),
}

# Those of every run of the suite: each axis, schedule and option at least once, mixed as much as can be.
OFTEN = {
    "fsdp 8, zero 1",
    "fsdp 8, zero 2, 2 micro-batches",
    "fsdp 8, zero 3, LoRA",
    "tensor 8",
    "tensor 4, sequence parallel, LoRA",
    "context 8, ring, LoRA",
    "context 4, ulysses",
    "pipe 4, gpipe",
    "pipe 4, 1f1b, LoRA",
    "pipe 2, 1f1b, first 2 layers frozen",
    "fsdp 2, pipe 4, zero 1",
    "tensor 2, context 2, ulysses, sequence parallel",
    "context 2, pipe 3, ring, 4 layers",
    "fsdp 2, tensor 2, pipe 2, interleaved, LoRA",
    "tensor 2, context 2, pipe 2, LoRA",
    "remat full",
    "pipe 2, fsdp 2, unrolled, LoRA",
    "pipe 2, fsdp 2, remat block",
    "fsdp 4, offload optimizer",
    "fsdp 4, offload activations",
    "fsdp 2, pipe 2, offload all",
    "fsdp 8, zero 2, Adafactor",
}
