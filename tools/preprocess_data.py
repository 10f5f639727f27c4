#!/usr/bin/env python3
"""Tokenise JSON lines once, into the .bin and .idx files of Megatron-LM, which data.format: megatron reads.

The options are those of Megatron-LM's tools/preprocess_data.py, and so are the files: PREFIX_KEY_document.bin and
.idx for every KEY of --json-keys, with a document for each line.

Left out are: --split-sentences, --keep-newlines and --lang, since a decoder learns whole documents, and the splitter
is a pickle (a text that is a list of sentences keeps them as sequences); tokenizers that are not Hugging Face's, since
every model here has one of these; --find-optimal-num-workers, since the progress tells how fast it goes.
"""

import argparse
import glob
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from jaxtune.data.megatron import open_dataset, smallest_dtype  # noqa: E402 - the checkout's own
from jaxtune.data.preprocess import Task, preprocess, read_lines  # noqa: E402
from jaxtune.errors import DataError, SaveError, explained  # noqa: E402
from jaxtune.files import is_disks  # noqa: E402
from jaxtune.hub import resolve_model  # noqa: E402
from jaxtune.tokenizer import load_tokenizer, vocabulary_size  # noqa: E402


class Meter:
    """Documents, MB of lines a second and the time left: a bar in a terminal, elsewhere a line now and then."""

    def __init__(self, partitions: int, interval: int, console: Console, clock: Callable[[], float] = time.monotonic):
        """interval: documents between two updates."""
        self._documents = self._size = self._shown = 0
        self._shares, self._interval, self._console, self._clock = [0.0] * partitions, interval, console, clock
        self._first: tuple | None = None  # time, documents, size and share when the first workers had begun to answer
        text = TextColumn("{task.percentage:>3.0f}%  {task.description}", markup=False)
        self._bar = Progress(BarColumn(16), text, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("starting the workers", total=1.0) if self._bar else None

    def __enter__(self) -> "Meter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, partition: int, documents: int, size: int, share: float) -> None:
        """What a partition has done since it was last heard of; share: of all that it is to do."""
        self._documents, self._size = self._documents + documents, self._size + size
        self._shares[partition] = share
        self._first = self._first or (self._clock(), self._documents, self._size, self._done)
        if self._documents // self._interval == self._shown:
            return
        self._shown = self._documents // self._interval
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=self.summary())
        else:
            self._console.print(self.summary(), soft_wrap=True)

    @property
    def _done(self) -> float:
        return sum(self._shares) / len(self._shares)

    def summary(self) -> str:
        began, documents, size, done = self._first or (0.0, 0, 0, 0.0)
        passed, share = self._clock() - began, self._done - done
        text = f"{self._documents:,} documents"
        if passed > 0 and self._documents > documents:
            text += f", {(self._documents - documents) / passed:,.0f} documents/s"
            text += f", {(self._size - size) / passed / 1e6:.2f} MB/s"
        if passed > 0 and share > 0:
            minutes, seconds = divmod(round(passed * (1 - self._done) / share), 60)
            text += f", {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        return text


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(stderr=True, highlight=False, markup=False)
    try:
        task = plan(options)
        with Meter(task.partitions, options.log_interval, console) as meter:
            preprocess(task, meter.add)
        for name in task.names().values():
            made = open_dataset(name)
            print(f"{name}.bin: {len(made):,} documents, {len(made.tokens):,} tokens of type {task.dtype.name}")
        return 0
    except BrokenProcessPool:
        told = "a worker process ended without a word; was it out of memory? Use fewer --workers", 1
    except OSError as error:
        told = f"{error.filename or options.output_prefix}: {error.strerror}", 2
        if is_disks(error):
            told = f"{told[0]}; make room, or mend the disk, then run the same command again", SaveError.exit_code
    except SystemExit as stop:
        told = "Stopped by SIGTERM.", stop.code
    except BaseException as error:
        told = explained(error)
        if told is None:
            raise
    console.print(f"Error: {told[0]}", soft_wrap=True)
    return told[1]


def plan(options: argparse.Namespace) -> Task:
    """The task that the options ask for.

    Raises:
        DataError, ModelError: the input or the tokenizer is not there.
    """
    files = tuple(sorted(glob.glob(options.input))) or (options.input,)
    for path in files:
        if not os.path.isfile(path):
            raise DataError(f"--input {path}: no such file; expected JSON lines, .gz or not, or a pattern of names")
    where = resolve_model(options.tokenizer_model, weights=False)
    Path(options.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    lines = sum(1 for path in files for _ in read_lines(path)) if options.keep_sequential_samples else None
    return Task(
        files=files,
        keys=tuple(dict.fromkeys(options.json_keys)),
        prefix=options.output_prefix,
        tokenizer=where,
        dtype=smallest_dtype(vocabulary_size(load_tokenizer(where))),
        special_tokens=not options.tokenizer_hf_no_include_special_tokens,
        append_eod=options.append_eod,
        workers=options.workers // options.partitions,
        partitions=options.partitions,
        block=None if lines is None else max(1, -(-lines // options.partitions)),
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="JSON lines, .gz or not; 'data/*.jsonl' for several")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="columns to take; by default text")
    add("--output-prefix", required=True, metavar="PREFIX", help="path of the files without _KEY_document.bin and .idx")
    add("--tokenizer-type", choices=["HuggingFaceTokenizer"], default="HuggingFaceTokenizer", help="the only one")
    add("--tokenizer-model", required=True, metavar="DIR", help="directory with a tokenizer.json, or a hub id")
    add("--tokenizer-hf-no-include-special-tokens", action="store_true", help="no <s> or the like around a text")
    add("--append-eod", action="store_true", help="end every document with the tokenizer's eos token")
    add("--workers", type=_positive, default=os.cpu_count(), metavar="N", help="processes; by default, one a core")
    add(
        "--partitions",
        type=_positive,
        default=1,
        metavar="N",
        help="parts with a reader and a writer of their own, for when one is too slow for all workers; "
        "lines are dealt out to them in turn, and they stand one after another in the files",
    )
    add("--keep-sequential-samples", action="store_true", help="keep the lines' order also in several --partitions")
    add("--log-interval", type=_positive, default=1000, metavar="N", help="documents between two lines of progress")
    options = parser.parse_args(arguments)
    if options.workers % options.partitions:
        parser.error(f"--workers {options.workers} is no multiple of --partitions {options.partitions}")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number, 1 or more")
    return int(text)


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
