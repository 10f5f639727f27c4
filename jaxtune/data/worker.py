"""The process in which rows are tokenised where there are many: a program of its own, started by workers.py.

It imports no JAX, so it starts quickly and takes no device. Protocol: JSON lines in; what a worker needs (`hello`)
once, then lists of rows. Out, for the first line and each list, one JSON line: {} or {error} or {crash}, or, of rows,
{counts, examples, tokens} and then three arrays as they lie in memory: lengths (int64), tokens (int32), supervised.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from jaxtune.config import DataSection
from jaxtune.data.encode import Lengths, encode_chunk
from jaxtune.data.examples import Examples
from jaxtune.data.formats import Row
from jaxtune.data.template import ChatTemplate, open_template
from jaxtune.errors import UserError
from jaxtune.tokenizer import without_torch

PATIENCE = 120.0  # seconds for a template's request: workers keep all cores busy, and a machine may have other work


def hello(section: DataSection, tokenizer: Any, has_template: bool, virtual: int) -> dict[str, Any]:
    """What a worker needs to do as this process would."""
    return {
        "section": section.model_dump(),
        "core": tokenizer.backend_tokenizer.to_str(),
        "special": tokenizer.special_tokens_map,
        "split_special": tokenizer.split_special_tokens,
        "chat_template": tokenizer.chat_template,
        "has_template": has_template,
        "virtual": virtual,
    }


def write_answer(file: IO[bytes], examples: Examples, counts: Lengths) -> None:
    """Of one list of rows."""
    head = {"counts": asdict(counts), "examples": len(examples), "tokens": len(examples.tokens)}
    file.write(json.dumps(head).encode() + b"\n")
    for array, kind in ((examples.lengths, "i8"), (examples.tokens, "i4"), (examples.supervised, "?")):
        file.write(array.astype(kind, copy=False).tobytes())


def read_answer(head: dict[str, Any], file: IO[bytes]) -> tuple[Examples, Lengths]:
    """What `write_answer` wrote after its `head`.

    Raises:
        EOFError: it ends too early.
    """
    lengths = _read(file, "i8", head["examples"])
    tokens, supervised = _read(file, "i4", head["tokens"]), _read(file, "?", head["tokens"])
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return Examples(tokens, supervised, starts), Lengths.of(head["counts"])


def _read(file: IO[bytes], kind: str, count: int) -> np.ndarray:
    size = count * np.dtype(kind).itemsize
    found = file.read(size)
    if len(found) < size:
        raise EOFError
    return np.frombuffer(found, kind)


class _Worker:
    def __init__(self, told: dict[str, Any]):
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        self._section = DataSection.model_validate(told["section"])
        core, template = Tokenizer.from_str(told["core"]), told["chat_template"]
        self._tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **told["special"])
        self._tokenizer.split_special_tokens = told["split_special"]
        self._template: ChatTemplate | None = None
        if told["has_template"]:
            self._template = open_template(self._tokenizer, self._section.template)
            self._template.seconds = PATIENCE
        self._virtual = told["virtual"]

    def encode(self, rows: list[dict[str, Any]]) -> tuple[Examples, Lengths]:
        made = [Row(**row) for row in rows]
        return encode_chunk(made, self._section, self._tokenizer, self._template, self._virtual)


def main() -> None:
    """Answer until the input ends."""
    without_torch()
    # What a library may print must not get between the answers.
    with os.fdopen(os.dup(1), "wb") as file:
        os.dup2(2, 1)
        worker: _Worker | None = None
        for line in sys.stdin.buffer:
            try:
                if worker is None:
                    worker = _Worker(json.loads(line))
                    file.write(b"{}\n")
                else:
                    write_answer(file, *worker.encode(json.loads(line)))
            except UserError as error:
                file.write(json.dumps({"error": str(error)}).encode() + b"\n")
            except Exception:
                file.write(json.dumps({"crash": traceback.format_exc()}).encode() + b"\n")
            file.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # whoever asked is gone
        os._exit(1)
