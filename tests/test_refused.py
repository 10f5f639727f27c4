"""Every combination that is refused stands in the docs with its reason, and every row there is refused.

The rows are those of the tables under "What is refused". The attempts below reach every `raise` of the functions that
judge combinations, so that a new refusal needs an attempt, and an attempt a row.
"""

import ast
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from pydantic import ValidationError

from jaxtune.config import Config, DataSection, OptimSection, make_tune
from jaxtune.data.locate import with_files
from jaxtune.errors import UserError
from jaxtune.loading import as_mesh
from jaxtune.mesh import make_mesh
from jaxtune.optim import make_schedule
from jaxtune.parallel.checks import check_offload, check_windows
from jaxtune.parallel.schedule import check_numbers
from jaxtune.parallel.zigzag import check_length
from tests.plan.shapes import config, step_of

REPOSITORY = Path(__file__).resolve().parent.parent
TWICE = {"schedule": "interleaved", "virtual_stages": 2}
SEQUENCE = {"sequence_parallel": True}


def says(**sections) -> Callable:
    """The configuration alone refuses."""
    own = {name: {"path": "-", **sections.pop(name, {})} for name in ("model", "data")}
    tune = sections.pop("tune", {})
    return lambda: Config.model_validate({**own, "tune": make_tune(tune), **sections})


def fits(**sections) -> Callable:
    """The mesh and the model refuse: 4 layers, 8 query heads, hidden_size 64, vocab_size 512; 16 rows of 64 tokens."""
    return lambda: step_of(config(**sections))


def places(**sizes) -> Callable:
    """Eight devices refuse."""
    return lambda: make_mesh(config(mesh={"fsdp": 1, **sizes}).mesh, jax.devices())


def loads(mesh) -> Callable:
    return lambda: as_mesh(mesh() if callable(mesh) else mesh)


def runs(**optim) -> Callable:
    """A run of ten steps refuses."""
    return lambda: make_schedule(OptimSection(**optim), 10)


# Start of a row -> attempts.
PARALLELISM = {
    "axes whose product": [
        places(data=3),
        places(data=3, fsdp=-1),
        says(mesh={"data": -1, "fsdp": -1}),
        says(mesh={"data": 0}),
    ],
    "`tensor` that": [fits(mesh={"tensor": 3})],
    "`fsdp` that": [fits(mesh={"fsdp": 3}, train={"batch_size": 15})],
    "`train.batch_size` that": [fits(train={"micro_batches": 3}), fits(mesh={"data": 3})],
    "a length that": [
        fits(mesh={"context": 2}, data={"max_length": 62}),
        fits(mesh={"tensor": 4, **SEQUENCE}, data={"max_length": 62}),
        lambda: check_length(62, 2),
    ],
    "`tune.method: oft`": [
        fits(tune={"method": "oft", "targets": ["down_proj"], "oft_block_size": 32}, mesh={"tensor": 8})
    ],
    "`context_attention: ulysses`": [
        fits(mesh={"context": 3, "context_attention": "ulysses"}, data={"max_length": 66})
    ],
    "more stages": [
        fits(mesh={"pipe": 5}, train={"micro_batches": 4}),
        fits(mesh={"pipe": 4, **TWICE}, train={"micro_batches": 4}),
    ],
    "`interleaved` with micro": [fits(mesh={"pipe": 2, **TWICE})],
    "`interleaved` with one": [
        says(mesh={"pipe": 2, "schedule": "interleaved"}),
        says(mesh={"pipe": 2, "virtual_stages": 2}),
        lambda: check_numbers("interleaved", 2, 4, 1),
        lambda: check_numbers("1f1b", 2, 4, 2),
    ],
    "`schedule: zero_bubble`": [says(mesh={"pipe": 2, "schedule": "zero_bubble"})],
    "`zero`, `sequence_parallel`": [
        says(mesh={"fsdp": 1, "zero": 2}),
        says(mesh=SEQUENCE),
        says(mesh={"context_attention": "ulysses"}),
        says(mesh={"schedule": "gpipe"}),
        says(mesh=TWICE),
    ],
    "`memory.offload: [activations]`": [
        says(memory={"offload": ["activations"], "remat": "block"}),
        says(memory={"offload": ["params", "params"]}),
    ],
    "`memory.offload` of": [
        lambda: check_offload(
            config(memory={"offload": ["params"]}),
            SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")])),
            "0.10.2",
        )
    ],
    "`memory.remat` with": [says(memory={"remat": ["router"]}), says(memory={"remat": []})],
    "`load_model(mesh=...)`": [
        loads({"pipe": 2, "fsdp": 4}),
        loads({"context": 2, "fsdp": 4}),
        loads({"rows": 8}),
        loads(lambda: Mesh(np.array(jax.devices()), ("rows",))),
    ],
}
PRECISION = {
    "`float8_scaling` without": [
        says(precision={"float8_scaling": "delayed"}),
        says(precision={"matmul": "float8", "float8_history": 4}),
        says(precision={"loss_scale": {"initial": 2.0}}),
    ],
    "`params: float16`": [says(precision={"params": "float16"})],
}
REST = {
    "a key of `tune`": [says(tune={"method": "full", "rank": 4}), says(tune={"freeze_first": 1})],
    "`data.system`": [
        says(data={"format": "text", "system": "-"}),
        says(data={"format": "megatron", "template": "-"}),
        says(data={"columns": {"text": "-"}}),
    ],
    "`data.tags`": [says(data={"tags": {"user": "-"}})],
    "`data.train_on`": [says(data={"train_on_prompt": True, "train_on": "last"}), says(data={"train_roles": []})],
    "`data.sources`": [
        says(data={"sources": [{"path": "-"}]}),
        says(data={"path": [], "sources": []}),
        says(data={"path": [], "sources": [{"path": "-"}], "dataset": "-"}),
    ],
    "a `weight` for": [
        says(data={"path": [], "sources": [{"path": "-"}, {"path": "-", "weight": 1.0}]}),
        says(data={"path": [], "sources": [{"path": "-", "weight": 1.0}]}),
        says(data={"path": [], "sources": [{"path": "-", "name": "a"}, {"path": "-", "name": "a"}]}),
    ],
    "`data.dataset_dir`": [says(data={"dataset_dir": "-"})],
    "`data.share_prefix` without": [
        says(data={"share_prefix": True, "packing": False}),
        says(data={"share_prefix": True, "streaming": True}),
        lambda: check_windows(
            SimpleNamespace(data=DataSection(path="-", share_prefix=True)), SimpleNamespace(windows=(None, 8))
        ),
    ],
    "`data.streaming` with": [
        says(data={"format": "megatron", "streaming": True}),
        says(data={"shuffle_buffer": 9}),
    ],
    "`data.split`": [lambda: with_files(DataSection(path="-", split="test"))],
    "`eval.split`": [says(eval={"split": "test"})],
    "`eval.every`": [says(eval={"every": 10})],
    "`data.too_long: split`": [says(data={"too_long": "split"})],
    "`data.num_samples`": [says(data={"format": "megatron", "num_samples": 2})],
    "a key of `optim`": [says(optim={"name": "sgd", "beta1": 0.5}), says(optim={"schedule": "linear", "decay": 0.2})],
    "`optim.warmup` or": [runs(warmup=2.5), runs(schedule="wsd", warmup=8, decay=4)],
    "`model.double_quant`": [
        says(model={"double_quant": True}),
        says(model={"quantize": "int8", "double_quant": True}),
    ],
    "`model.overrides`": [says(model={"overrides": {"num_hidden_layers": 2}})],
    "`eval.path` and": [says(eval={"path": "-", "fraction": 0.1})],
}
PAGES = {"parallelism.md": PARALLELISM, "precision.md": PRECISION, "config.md": REST}
# Values that are wrong by themselves, and need no row.
VALUES = [
    lambda: check_numbers("2f2b", 2, 4, 1),
    lambda: check_numbers("1f1b", 2, 0, 1),
    says(memory={"offload": "optimizer"}),
    says(data={"path": ""}),
    says(eval={"path": ""}),
]
# Where combinations are judged: all of a file, or these functions of it. The configuration's judges are in classes.
JUDGES = {
    "data/locate.py": {"_only_of_the_hub"},
    "config.py": None,
    "data_section.py": None,
    "loading.py": {"as_mesh", "_for_inference"},
    "mesh.py": None,
    "optim.py": None,
    "parallel/checks.py": None,
    "parallel/schedule.py": None,
    "parallel/stages.py": None,
    "parallel/ulysses.py": None,
    "parallel/zigzag.py": None,
}


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_the_docs_is_tried_and_every_attempt_has_a_row(page):
    starts, found = list(PAGES[page]), rows(page)
    assert len(starts) == len(found)
    assert [row for row, start in zip(found, starts, strict=True) if not row.startswith(start)] == []


def rows(page: str) -> list[str]:
    """The first cells of a page's table of refusals; each has a reason in the second."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    table = text.split("## What is refused\n")[1].split("|---|---|\n")[1].split("\n\n")[0]
    cells = [re.fullmatch(r"\| (.+) \| (.+) \|", line) for line in table.strip().splitlines()]
    assert all(cells), table
    return [cell[1] for cell in cells if cell]


def test_every_attempt_is_refused_and_they_reach_every_refusal():
    attempts = [attempt for page in PAGES.values() for row in page.values() for attempt in row] + VALUES
    reached = set().union(*map(lines_of, attempts))
    missed = [
        f"{name}:{first}"
        for name, functions in JUDGES.items()
        for first, last in raises(name, functions)
        if not any((name, line) in reached for line in range(first, last + 1))
    ]
    assert missed == []


def lines_of(attempt: Callable) -> set[tuple[str, int]]:
    """The lines of the package that an attempt was refused in: (file, line)."""
    with pytest.raises((UserError, ValidationError)) as caught:
        attempt()
    problems: list = [caught.value]
    if isinstance(caught.value, ValidationError):  # pydantic keeps what a validator raised
        problems += [item["ctx"]["error"] for item in caught.value.errors() if "error" in item.get("ctx", {})]
    frames = [frame for problem in problems for frame in traceback.extract_tb(problem.__traceback__)]
    package = REPOSITORY / "jaxtune"
    return {
        (Path(frame.filename).relative_to(package).as_posix(), frame.lineno or 0)
        for frame in frames
        if Path(frame.filename).is_relative_to(package)
    }


def raises(name: str, functions: set[str] | None) -> list[tuple[int, int]]:
    """First and last lines of the `raise` statements in a file's functions; in the configuration, of its classes."""
    tree = ast.parse((REPOSITORY / "jaxtune" / name).read_text(encoding="utf-8"))
    kind = ast.ClassDef if name in ("config.py", "data_section.py") else ast.FunctionDef
    judges = [node for node in ast.walk(tree) if isinstance(node, kind) and node.name != "_Loader"]
    return [
        (node.lineno, node.end_lineno or node.lineno)
        for judge in judges
        if functions is None or judge.name in functions
        for node in ast.walk(judge)
        if isinstance(node, ast.Raise)
    ]
