"""What comes out of a run: the adapter or model that training ends with, and the exports made from it later.

File formats are peft_io.py's and hf_io.py's; merging is tune/merge.py's.
"""

from pathlib import Path

from jaxtune.assemble import Assembled
from jaxtune.config import TuneSection
from jaxtune.models.weights import Tree
from jaxtune.tune.peft_io import save_adapter

ADAPTER, MODEL = "adapter", "model"


def result_directory(run_dir: Path, section: TuneSection) -> Path:
    """Where training with this method puts its result."""
    return run_dir / (ADAPTER if section.method == "lora" else MODEL)


def write_result(
    run_dir: Path, section: TuneSection, assembled: Assembled, params: Tree, dtype: str, base_model: str
) -> Path:
    """Write what training ends with, and give its directory: `adapter/` (PEFT) for lora, else `model/` (Hugging Face).

    section: of the configuration, resolved or not. params: the whole tree as trained, `combine(trainable, frozen)`.
    dtype: of the model's files, `precision.params`; an adapter is float32. base_model: `model.path`, for PEFT.
    Every process calls this. Each directory appears whole, under its name, at the end; one from before is replaced.
    """
    directory = result_directory(run_dir, section)
    if section.method == "lora":
        save_adapter(directory, section, assembled.model.weights, params, base_model)
    else:
        from jaxtune.hf_io import write_model

        model, source = assembled.model, assembled.source
        write_model(directory, params, model.weights, model.config, source.path, dtype)
    return directory
