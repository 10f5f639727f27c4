"""A training step over a quantised random model, as a run makes it, and models that bitsandbytes quantised."""

import functools
import json
from pathlib import Path

import jax
import numpy as np

from jaxtune.assemble import Source, assemble
from jaxtune.config import make_config
from jaxtune.mesh import make_mesh
from jaxtune.models.config import ModelConfig, Rope
from jaxtune.models.execution import Execution
from jaxtune.number_types import compute_dtype
from jaxtune.parallel.checks import check_fit
from jaxtune.program import build
from jaxtune.quant.scheme import scheme_of
from tests.programs import STEPS, Stepper, defaults

# Rows of 96 are no multiple of a block of 64: every two rows share three blocks.
CONFIG = ModelConfig("qwen2", 256, 64, 96, 2, 8, 2, 8, 64, tied=True, qkv_bias=True, rope=Rope(theta=1e4))
LORA = {"method": "lora", "rank": 4, "targets": ["q_proj", "down_proj"]}


def quantized(config, model: ModelConfig = CONFIG, init: str = "random"):
    """What a run assembles, checks and all; init as assemble's."""
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(list(config.mesh.sizes.values())))])
    check_fit(config, mesh, model)
    source = Source(Path("-"), model, None, scheme_of(config.model, model, "-"))
    execution = Execution.of(config, compute_dtype(config.precision.compute))
    return assemble(source, config.tune, mesh, init=init, dtype=config.precision.params, seed=1, execution=execution)


def configuration(quantize=None, double=False, **sections):
    own = defaults({"tune": LORA, "train": {"batch_size": 16}, "data": {"path": "-"}, **sections})
    return make_config({"model": {"path": "-", "quantize": quantize, "double_quant": double}, **own})


class QuantStepper(Stepper):
    """The step of a configuration over a quantised base."""

    def __init__(self, quantize=None, double=False, rows=16, time=32, **sections):
        self.config = configuration(quantize, double, **sections)
        self.rows, self.time, self.vocab = rows, time, CONFIG.vocab_size
        made = quantized(self.config)
        self.mesh, self.model = made.mesh, made.model
        self.program = build(self.config, made.model, made.mesh, made.params, made.mask, STEPS)
        self.state, self.frozen = self.program.state, self.program.frozen


def kernel(name: str):
    """A kernel of bitsandbytes' torch implementation, backends/default/ops.py, which is the definition.

    A CPU has kernels of its own; a device that bitsandbytes knows nothing of has the definition's.
    """
    import bitsandbytes  # noqa: F401 - registers the kernels
    import torch

    found = torch.library.get_kernel(f"bitsandbytes::{name}", "XLA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return lambda *arguments: found.call_boxed(keys, *arguments)


@functools.cache
def as_defined():
    """bitsandbytes dequantises 4-bit weights on this CPU by its definition, as long as what is returned lives.

    Its kernel for CPUs with AVX-512 (0.50) gives wrong numbers, off by as much as the weight itself, where the rows of
    a weight are not whole blocks.
    """
    import torch

    definition = kernel("dequantize_4bit")
    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("dequantize_4bit", definition, "CPU", allow_override=True)
    return library


def write_quantized(model: Path, directory: Path, **settings) -> Path:
    """A checkpoint of `model` that transformers quantised with bitsandbytes and wrote, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tests.peer import write_tokenizer

    as_defined()
    made = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    made.save_pretrained(directory)
    return write_tokenizer(directory)


def dequantized_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """The logits that transformers computes in float32 with the weights that bitsandbytes dequantises."""
    import torch
    from transformers import AutoModelForCausalLM

    as_defined()
    model = AutoModelForCausalLM.from_pretrained(directory).dequantize().float().eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def edit_config(directory: Path, **settings) -> None:
    """Change fields of quantization_config."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= settings
    file.write_text(json.dumps(config))
