"""Writes tests/data/files/llamafactory_qwen.json: what LLaMA-Factory makes of the data folder beside it, in tokens.

Its own code reads the folder, converts the rows, and makes tokens and labels with its template `qwen`. It needs
torch and more, so it was run once:

    pip install llamafactory==0.9.5
    DISABLE_VERSION_CHECK=1 python tests/data/make_llamafactory.py QWEN_TOKENIZER

with the directory of Qwen2.5's tokenizer. (The check is of transformers, of which it allows none past 5.6.) It is no
test.
"""

import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

if find_spec("torchaudio") is None:  # which LLaMA-Factory imports for sounds, of which there are none here
    from importlib.machinery import ModuleSpec

    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

import datasets
from llamafactory.data.loader import _load_single_dataset
from llamafactory.data.parser import get_dataset_list
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
from transformers import AutoTokenizer

FILES = Path(__file__).parent / "files"
NAMES = ["lighthouse", "harbour", "letters"]
SETTINGS = {"default": {}, "mask_history": {"mask_history": True}, "train_on_prompt": {"train_on_prompt": True}}


def encoded(name: str, tokenizer, settings: dict) -> list[dict[str, list[int]]]:
    """The tokens and labels of every row that is kept."""
    arguments = DataArguments(template="qwen", dataset=name, dataset_dir=str(FILES / "llamafactory"), **settings)
    arguments.preprocessing_num_workers = None
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    model = SimpleNamespace(cache_dir=None, hf_hub_token=None)
    training = SimpleNamespace(local_process_index=0)
    (entry,) = get_dataset_list([name], arguments.dataset_dir)
    rows = _load_single_dataset(entry, model, arguments, training)
    processor = SupervisedDatasetProcessor(template, tokenizer, None, arguments)
    made = processor.preprocess_dataset(rows.to_dict())
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(made["input_ids"], made["labels"])]


def main() -> None:
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
    lines = [f'"{package}": "{version(package)}"' for package in ("llamafactory", "datasets", "transformers")]
    for setting, given in SETTINGS.items():
        for name in NAMES:
            rows = [json.dumps(row, separators=(",", ":")) for row in encoded(name, tokenizer, given)]
            lines.append(f'"{setting} {name}": [\n' + ",\n".join(rows) + "\n]")
    (FILES / "llamafactory_qwen.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
