"""Writes tests/quant/files/: small weights packed by the real GPTQ and AWQ tools, and what those tools read back;
and what AutoGPTQ's own search makes of a weight.

The tools themselves need CUDA builds that a test machine does not have, so their own packing code was run once, from
their unpacked source packages, by this script:

    python tests/quant/make_tool_files.py AUTO_GPTQ AUTOAWQ GPTQMODEL

with the directories of auto-gptq 0.7.1, autoawq 0.2.9 and gptqmodel 7.7.0. It needs torch, and is no test.
"""

import ast
import importlib.util
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

FILES = Path(__file__).parent / "files"
INPUTS, OUTPUTS, GROUP = 64, 32, 32


def load(path: Path, name: str):
    """One module of a package, without the package's own imports."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def functions(path: Path, names: set[str], given: dict) -> SimpleNamespace:
    """Functions and methods of a file by name, without the file's imports. given: what they refer to."""
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    for node in found:
        node.decorator_list, node.returns = [], None
        for argument in node.args.args:
            argument.annotation = None
    exec(compile(ast.Module(found, []), str(path), "exec"), given)
    return SimpleNamespace(**{name: given[name] for name in names})


def grid(bits: int, symmetric: bool, groups: torch.Tensor):
    """A random weight [N, K] that lies on the grid of scales and zeros [N, G]. No zero is 0."""
    scales = (0.5 + torch.rand(OUTPUTS, int(groups.max()) + 1)).half().float() * 4 / 2**bits
    top = 2**bits - 1
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else torch.randint(1, top + 1, scales.shape).float()
    codes = torch.randint(0, top + 1, (OUTPUTS, len(groups))).float()
    return (codes - zeros[:, groups]) * scales[:, groups], scales, zeros


def groups_of(group: int, is_ordered: bool) -> torch.Tensor:
    """The group of each input: one after another, or (act-order) in an order of their own."""
    order = torch.randperm(INPUTS) if is_ordered else torch.arange(INPUTS)
    groups = torch.empty(INPUTS, dtype=torch.int32)
    groups[order] = torch.arange(INPUTS, dtype=torch.int32) // group
    return groups


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


CASES = {
    **{f"b{bits}": (bits, True, GROUP, False) for bits in (2, 3, 4, 8)},
    **{f"b{bits}_act_order": (bits, False, GROUP, True) for bits in (2, 3, 4, 8)},
    "b4_one_group": (4, True, INPUTS, False),
}


def auto_gptq(home: Path) -> None:
    """Format v1. `weight` is [K, N] in float16, as its CPU path multiplies with it."""
    tool = load(home / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py", "qlinear_cuda")
    saved = {}
    for name, (bits, symmetric, group, is_ordered) in CASES.items():
        groups = groups_of(group, is_ordered)
        weight, scales, zeros = grid(bits, symmetric, groups)
        layer = tool.QuantLinear(bits, group, INPUTS, OUTPUTS, False, weight_dtype=torch.float16)
        layer.pack(linear(weight).half(), scales, zeros.clone(), groups)
        read = layer(torch.eye(INPUTS, dtype=torch.float16))
        saved |= {f"{name}.{key}": value for key, value in layer.state_dict().items()} | {f"{name}.weight": read}
    save_file({key: value.contiguous() for key, value in saved.items()}, FILES / "auto_gptq.safetensors")


def gptqmodel(home: Path) -> None:
    """Format v2, and v1 as it converts it; `weight` is [K, N] in float16."""
    given = {"np": np, "t": torch, "nn": torch.nn, "math": math, "transformers": transformers, "_ConvNd": type(None)}
    given |= {"THREADPOOLCTL": SimpleNamespace(threadpool_limits=lambda n: torch.no_grad())}
    names = {"pack_original", "dequantize_weight", "_dequantize_from_codes", "_torch_right_shift", "_torch_left_shift"}
    names |= {"_torch_shift_factor"}
    tool = functions(home / "gptqmodel/nn_modules/qlinear/__init__.py", names, given)
    saved = {}
    for name, (bits, symmetric, group, is_ordered) in CASES.items():
        groups = groups_of(group, is_ordered)
        weight, scales, zeros = grid(bits, symmetric, groups)
        layer = SimpleNamespace(bits=bits, maxq=2**bits - 1, planar=False, pack_factor=32 // bits, pack_dtype_bits=32)
        layer.pack_np_math_dtype, layer.pack_np_dtype, layer.in_features = np.uint32, np.int32, INPUTS
        layer.dequant_dtype = torch.int16 if bits == 8 else torch.int8
        layer.register_buffer = lambda key, value, layer=layer: setattr(layer, key, value)
        layer._init_wf_unsqueeze_buffers = lambda: None
        tool.pack_original(layer, linear(weight), scales, zeros, groups)
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)[None]
        if bits == 3:
            rows = [[*range(0, 31, 3), 0], [0, *range(1, 32, 3)], [0, *range(2, 30, 3), 0]]
            shifts = torch.tensor([rows], dtype=torch.int32)
        layer.wf_unsqueeze_zero, layer.wf_unsqueeze_neg_one = shifts[None], shifts[..., None]
        layer._dequantize_from_codes = lambda *args, layer=layer, **kw: tool._dequantize_from_codes(layer, *args, **kw)
        tensors = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
        saved |= {f"{name}.{key}": value.clone() for key, value in tensors.items()}
        saved[f"{name}.weight"] = tool.dequantize_weight(layer)
    save_file({key: value.contiguous() for key, value in saved.items()}, FILES / "gptqmodel.safetensors")


def autoawq(home: Path) -> None:
    """Version gemm; `weight` is [K, N] in float16."""
    for name in ("awq", "awq.utils", "awq.utils.module", "awq.utils.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["awq.utils.module"].try_import = lambda name: (None, "")
    sys.modules["awq.utils.utils"].get_best_device = lambda: "cpu"
    packing = load(home / "awq/utils/packing_utils.py", "awq.utils.packing_utils")
    tool = load(home / "awq/modules/linear/gemm.py", "gemm")
    weight, scales, zeros = grid(4, False, groups_of(GROUP, False))
    columns = {"scales": scales.T.contiguous(), "zeros": zeros.T.contiguous()}
    layer = tool.WQLinear_GEMM.from_linear(linear(weight), 4, GROUP, **columns)
    saved = layer.state_dict()
    saved["weight"] = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP)
    save_file({key: value.contiguous() for key, value in saved.items()}, FILES / "autoawq.safetensors")


SEARCHES = {  # bits, symmetric, inputs of a group, act-order
    "b4": (4, True, 32, False),
    "b4_act_order": (4, True, 32, True),
    "b3_asymmetric": (3, False, 32, False),
    "b2_one_group": (2, True, -1, True),
}


def auto_gptq_itself(home: Path) -> None:
    """What its GPTQ class makes of a weight [N, K] and inputs that go with one another: the weight on the grid."""
    package = types.ModuleType("quantization")
    package.__path__ = [str(home / "auto_gptq/quantization")]
    sys.modules["quantization"] = package
    load(home / "auto_gptq/quantization/quantizer.py", "quantization.quantizer")
    tool = load(home / "auto_gptq/quantization/gptq.py", "quantization.gptq")
    torch.cuda.synchronize = lambda: None
    inputs = torch.randn(256, 96) @ (0.2 * torch.randn(96, 96) + torch.eye(96))
    inputs[:, 7] = 0
    weight = torch.randn(16, 96)
    weight[:, 7] = 0
    saved = {"inputs": inputs, "before": weight.clone()}
    for name, (bits, symmetric, group, is_ordered) in SEARCHES.items():
        layer = linear(weight)
        search = tool.GPTQ(layer)
        search.quantizer.configure(bits, perchannel=True, sym=symmetric, mse=False)
        search.add_batch(inputs, None)
        scales, zeros, groups = search.fasterquant(max(group, 32), 0.01, group, is_ordered)
        saved |= {f"{name}.weight": layer.weight.data, f"{name}.scales": scales, f"{name}.zeros": zeros}
        saved[f"{name}.g_idx"] = groups.int()
    save_file({key: value.contiguous() for key, value in saved.items()}, FILES / "auto_gptq_itself.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    FILES.mkdir(exist_ok=True)
    for write, home in zip((auto_gptq, autoawq, gptqmodel), sys.argv[1:], strict=True):
        write(Path(home))
    auto_gptq_itself(Path(sys.argv[1]))
