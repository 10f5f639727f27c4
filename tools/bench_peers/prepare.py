"""The model, the rows and the work of a case, before its sides run.

usage: prepare.py PLAN.json

PLAN: {"shape": "0.5B", "7B" or "smollm2", "words": a directory or .gguf, "config": file of jaxtune's configuration,
"conversations": file of the configuration whose rows are joined to blocks, or null, "rows": file to write}.
Prints {"flops_per_token": ..., "num_rows": ..., "tokens_per_row": ...}.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the names of the scripts here would hide packages

from jaxtune import tune  # noqa: E402
from jaxtune.assemble import FULL, Source, assemble  # noqa: E402
from jaxtune.config import Config, load_config  # noqa: E402
from jaxtune.data.loader import build_data  # noqa: E402
from jaxtune.data.megatron import DatasetWriter  # noqa: E402
from jaxtune.hf_io import resolve_model, write_model  # noqa: E402
from jaxtune.mesh import single_device_mesh  # noqa: E402
from jaxtune.models.families import parse_config, read_config  # noqa: E402
from jaxtune.plan.flops import model_flops  # noqa: E402
from jaxtune.tokenizer import load_tokenizer, save_tokenizer  # noqa: E402
from tools.device_bench import SHAPES  # noqa: E402


def prepare(plan: dict) -> dict[str, float]:
    config = load_config(plan["config"])
    if not (Path(config.model.path) / "config.json").exists():
        make_model(plan["shape"], resolve_model(plan["words"], weights=False), Path(config.model.path))
    rows = read_rows(load_config(plan["conversations"] or plan["config"]))
    if plan["conversations"]:
        rows = blocks(rows, config.data.max_length)
        write_documents(config.data.paths[0], rows)
    Path(plan["rows"]).write_text(json.dumps(rows))
    lengths = [len(row["input_ids"]) for row in rows]
    per_token = flops_per_token(config, sum(n * n for n in lengths) / sum(lengths))
    return {"flops_per_token": per_token, "num_rows": len(rows), "tokens_per_row": sum(lengths) / len(rows)}


def make_model(shape: str, words: Path, directory: Path) -> None:
    """A Hugging Face directory: of random weights with a tokenizer, or of what a .gguf holds."""
    pretrained = shape not in SHAPES
    settings = read_config(words, {}) if pretrained else parse_config(SHAPES[shape], "bench.py")
    dtype = "bfloat16" if shape == "7B" else "float32"
    source = Source(words, settings, load_tokenizer(words))
    init = "pretrained" if pretrained else "random"
    made = assemble(source, FULL, single_device_mesh(), init=init, dtype=dtype)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not pretrained and words.suffix == ".gguf":
        # As files that go along as they are: of a model of another type, transformers would cut text otherwise, and
        # write_model refuses to make such. Here every side gets tokens.
        words = directory.parent / "words"
        words.mkdir(exist_ok=True)
        save_tokenizer(source.tokenizer, words)
    model = made.model
    write_model(directory, made.params, model.weights, model.config, words, dtype, tokenizer=source.tokenizer)


def blocks(rows: list[dict], length: int) -> list[dict]:
    """All rows joined and cut into whole blocks; a rest that is shorter is left out, for every side alike."""
    tokens = [token for row in rows for token in row["input_ids"]]
    starts = range(0, len(tokens) - length + 1, length)
    return [{"input_ids": tokens[at : at + length], "supervised": [0] + [1] * (length - 1)} for at in starts]


def write_documents(prefix: str, rows: list[dict]) -> None:
    """The rows as jaxtune reads them."""
    with DatasetWriter(prefix) as writer:
        for row in rows:
            writer.add_document(row["input_ids"])
        writer.finalize()


def read_rows(config: Config) -> list[dict]:
    """The very tokens and labels of jaxtune's data."""
    tokenizer = Source.open(config.model).tokenizer
    examples = build_data(config.data, config.eval, config.train, tokenizer).train.examples
    pairs = (examples.read(index) for index in range(len(examples)))
    return [{"input_ids": tokens.tolist(), "supervised": supervised.tolist()} for tokens, supervised in pairs]


def flops_per_token(config: Config, time: float) -> float:
    """What the model asks for (model_flops), for a token that attends in a row of `time` of them."""
    tuning = tune.resolve(config.tune)
    made = assemble(Source.open(config.model, None, tuning), tuning, single_device_mesh(), init="shapes")
    return model_flops(made.model.config, made.model.weights, made.mask, made.params, 1, time)


if __name__ == "__main__":
    print(json.dumps(prepare(json.loads(Path(sys.argv[1]).read_text()))))
