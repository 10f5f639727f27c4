"""The tool's files are those of Megatron: byte for byte what megatron-core's builder makes of the same lines."""

import contextlib
import gzip
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxtune.data import preprocess as module
from jaxtune.data.megatron import DTYPES, DatasetWriter, open_dataset
from jaxtune.data.preprocess import Chunk, Encoder, Task, chunks_of, preprocess, read_lines
from jaxtune.errors import DataError
from tests.conftest import child_environment
from tests.data import documents
from tests.data.templates import tokenizer
from tools import preprocess_data as tool

WORDS = ["the", "keeper", "of", "the", "lighthouse", "counts", "ships", "小主", "é"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A directory with a tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save_pretrained(path)
    return path


def texts_of(count: int) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, random.integers(0, 9))) for _ in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def task(words: Path, tmp_path: Path, *files: Path, **settings) -> Task:
    kind = {"keys": ("text",), "prefix": str(tmp_path / "out"), "tokenizer": words, "dtype": DTYPES[8], **settings}
    return Task(files=tuple(map(str, files)), **kind)


def run(repository, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(repository / "tools" / "preprocess_data.py"), *map(str, arguments)]
    return subprocess.run(command, env=child_environment(1, None), timeout=300, capture_output=True, text=True)


def lists(prefix) -> list[list[int]]:
    dataset = open_dataset(str(prefix))
    return [dataset[number].tolist() for number in range(len(dataset))]


# The whole of it


@pytest.mark.slow
def test_files_are_byte_for_byte_those_that_megatron_core_builds(repository, words, tmp_path):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    rows = [{"text": text, "title": text[:5], "other": 1} for text in texts_of(700)]
    rows[3]["text"] = ["It is late.", "", "Good night."]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    given = ["--json-keys", "text", "title", "--append-eod", "--workers", 2, "--log-interval", 250]
    names = ["--input", tmp_path / "a.jsonl.gz", "--output-prefix", tmp_path / "new" / "ours"]
    done = run(repository, *names, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", words, *given)
    assert done.returncode == 0, done.stderr
    tok = tokenizer()
    for key in ("text", "title"):
        theirs = str(tmp_path / f"theirs_{key}_document")
        builder = IndexedDatasetBuilder(theirs + ".bin", dtype=DType.optimal_dtype(len(tok)))
        for row in rows:  # as process_json_file in Megatron's tool does
            sentences = row[key] if isinstance(row[key], list) else [row[key]]
            encoded = [ids for sentence in sentences if (ids := tok(sentence).input_ids)]
            lengths = [len(ids) for ids in encoded]
            ids = [token for sentence in encoded for token in sentence]
            if ids:
                ids.append(tok.eos_token_id)
                lengths[-1] += 1
            builder.add_document(ids, lengths)
        builder.finalize(theirs + ".idx")
        for ending in (".bin", ".idx"):
            ours = tmp_path / "new" / f"ours_{key}_document{ending}"
            assert ours.read_bytes() == Path(theirs + ending).read_bytes(), (key, ending)
    assert len(list((tmp_path / "new").iterdir())) == 4
    assert "ours_text_document.bin: 700 documents, " in done.stdout and "tokens of type uint16" in done.stdout
    assert len(done.stderr.splitlines()) == 2 and "512 documents, " in done.stderr and "MB/s" in done.stderr


@pytest.mark.slow
def test_a_wrong_line_ends_it_with_file_and_line_and_leaves_no_file(repository, words, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}] * 400)
    path.write_text(path.read_text() + '{"text": 5}\n')
    done = run(repository, "--input", path, "--output-prefix", tmp_path / "o" / "x", "--tokenizer-model", words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f'{path}:401: column "text" holds a number' in done.stderr
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("sequential", [True, False])
def test_partitions_are_put_together_in_their_order(repository, words, tmp_path, monkeypatch, sequential):
    rows = [{"text": text} for text in texts_of(600)]
    files = [write(tmp_path / "a1.jsonl", rows[:250]), write(tmp_path / "a2.jsonl", rows[250:])]
    told: list[tuple] = []
    two = task(words, tmp_path, *files, partitions=2, workers=1, block=300 if sequential else None)
    preprocess(two, lambda *progress: told.append(progress))
    encoded = [tokenizer()(row["text"]).input_ids for row in rows]
    assert lists(tmp_path / "out_text_document") == (encoded if sequential else encoded[::2] + encoded[1::2])
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out_text_document.bin", "out_text_document.idx"]
    assert {partition for partition, *_ in told} == {0, 1} and sum(count for _, count, *_ in told) == 600


@pytest.mark.slow
def test_a_wrong_line_in_one_partition_ends_all(words, tmp_path):
    rows: list[dict] = [{"text": text} for text in texts_of(600)]
    rows[301] = {"txt": ""}
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r'a\.jsonl:302: no column "text"; found txt; set --json-keys'):
        preprocess(task(words, tmp_path, path, partitions=2, workers=1), lambda *_: None)
    assert [path.name for path in tmp_path.glob("out*")] == []


def test_the_parts_take_no_name_of_another_data_set(words, tmp_path, monkeypatch):
    def write_parts(two: Task, _) -> None:
        for partition in range(2):
            with DatasetWriter(two.names(partition)["text"], two.dtype) as writer:
                writer.add_document([partition])
                writer.finalize()
        Path(two.names(0)["text"] + ".idx.tmp").touch()  # as a process leaves it that is killed

    other = documents.write(tmp_path / "out_0_text_document")
    monkeypatch.setattr(module, "_write_partitions", write_parts)
    preprocess(task(words, tmp_path, partitions=2), lambda *_: None)
    assert lists(tmp_path / "out_text_document") == [[0], [1]] and lists(other) == documents.DOCUMENTS
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("partitions", [1, 2])
def test_of_two_that_write_one_data_set_the_second_is_refused_and_the_first_goes_on(words, tmp_path, partitions):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    again = task(words, tmp_path, path, partitions=partitions)
    with DatasetWriter(again.names()["text"], again.dtype) as first:
        part = Path(f"{tmp_path}/.out_text_document.part0.bin.tmp")
        part.touch()
        with pytest.raises(DataError, match=r"out_text_document\.bin: another process writes it"):
            preprocess(again, lambda *_: None)
        assert part.exists()
        first.add_document([1])
        first.finalize()
    assert lists(tmp_path / "out_text_document") == [[1]]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_its_processes_end_with_it(repository, words, tmp_path, number):
    path = write(tmp_path / "a.jsonl", [{"text": text * 20} for text in texts_of(30_000)])
    given = ["--input", path, "--output-prefix", tmp_path / "out", "--tokenizer-model", words, "--log-interval", 1]
    command = [sys.executable, repository / "tools" / "preprocess_data.py", *given, "--workers", 2, "--partitions", 2]
    settings = {"env": child_environment(1, None), "stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(list(map(str, command)), text=True, **settings) as process:
        try:
            assert "documents" in process.stderr.readline()
            process.send_signal(number)
            _, told = process.communicate(timeout=120)  # until nobody has its stderr any more
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in told and not (tmp_path / "out_text_document.bin").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 143 and told.endswith("Stopped by SIGTERM.\n")
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# Options


def test_the_options_are_megatrons_and_those_left_out_are_explained(capsys):
    with pytest.raises(SystemExit):
        tool.parse(["--help"])
    told = capsys.readouterr().out
    for name in ("split-sentences", "keep-newlines", "lang", "find-optimal-num-workers", "keep-sequential-samples"):
        assert f"--{name}" in told, name
    with pytest.raises(SystemExit) as caught:
        tool.parse([*GIVEN, "--split-sentences"])
    assert caught.value.code == 2


GIVEN = ["--input", "a", "--output-prefix", "b", "--tokenizer-model", "c"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--workers", "3", "--partitions", "2"], "--workers 3 is no multiple of --partitions 2"),
        (["--workers", "0"], "--workers: '0'; allowed: a whole number, 1 or more"),
        (["--log-interval", "0"], "--log-interval: '0'; allowed: a whole number, 1 or more"),
        (["--log-interval", "x"], "--log-interval: 'x'; allowed: a whole number, 1 or more"),
        (["--tokenizer-type", "SentencePieceTokenizer"], "HuggingFaceTokenizer"),
    ],
)
def test_options_that_cannot_be_are_refused(capsys, more, message):
    with pytest.raises(SystemExit) as caught:
        tool.parse([*GIVEN, *more])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--input", "--output-prefix", "--tokenizer-model"])
def test_what_has_to_be_given_is_asked_for(capsys, missing):
    at = GIVEN.index(missing)
    with pytest.raises(SystemExit):
        tool.parse(GIVEN[:at] + GIVEN[at + 2 :])
    assert missing in capsys.readouterr().err


def test_a_plan_of_all_options(words, tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", [{}] * 5)
    given = ["--input", f"{tmp_path}/*.jsonl", "--output-prefix", f"{tmp_path}/x", "--tokenizer-model", str(words)]
    more = ["--workers", "6", "--partitions", "3", "--keep-sequential-samples", "--json-keys", "a", "b", "a"]
    plan = tool.plan(tool.parse([*given, *more, "--tokenizer-hf-no-include-special-tokens", "--append-eod"]))
    assert [Path(path).name for path in plan.files] == ["a.jsonl", "b.jsonl"]
    assert (plan.workers, plan.partitions, plan.block, plan.keys) == (2, 3, 4, ("a", "b"))
    assert plan.append_eod and not plan.special_tokens and plan.dtype == DTYPES[8]


def test_an_input_or_a_tokenizer_that_is_not_there_is_named(words, tmp_path, capsys):
    names = ["--output-prefix", str(tmp_path / "x"), "--tokenizer-model"]
    assert tool.main(["--input", str(tmp_path / "no.jsonl"), *names, str(words)]) == 2
    assert "no.jsonl: no such file" in capsys.readouterr().err
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "config.json").write_text("{}")
    assert tool.main(["--input", str(path), *names, str(tmp_path)]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err


def test_a_killed_worker_and_ctrl_c_end_it_with_a_word(words, tmp_path, capsys, monkeypatch):
    given = ["--input", str(write(tmp_path / "a.jsonl", [{"text": "a"}])), "--output-prefix", str(tmp_path / "x")]
    for error, code, told in (
        (tool.BrokenProcessPool(), 1, "a worker process ended without a word"),
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C"),
        (OSError(28, "No space left on device", "x.bin.tmp"), 1, "x.bin.tmp: No space left on device; make room"),
        (OSError(13, "Permission denied", "x.bin.tmp"), 2, "x.bin.tmp: Permission denied\n"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(tool, "preprocess", fail)
        assert tool.main([*given, "--tokenizer-model", str(words)]) == code
        assert told in capsys.readouterr().err


# Lines


def lines_of(task: Task, partition: int = 0) -> list[tuple[str, int]]:
    return [(Path(path).stem, number) for chunk in chunks_of(task, partition) for path, number, _ in chunk.lines]


@pytest.mark.parametrize("block", [None, 5])
def test_every_line_is_in_one_partition(words, tmp_path, block):
    files = [write(tmp_path / f"{name}.jsonl", [{}] * 7) for name in "ab"]
    parts = [lines_of(task(words, tmp_path, *files, partitions=3, block=block), number) for number in range(3)]
    everything = [(name, number) for name in "ab" for number in range(1, 8)]
    expected = [everything[n::3] if block is None else everything[5 * n :][:5] for n in range(3)]
    assert parts == expected


def test_chunks_are_bounded_in_lines_and_bytes_and_a_long_line_is_one(words, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LINES", 3)
    monkeypatch.setattr(module, "CHUNK_BYTES", 40)
    sizes = [5, 5, 5, 5, 30, 30, 100, 5]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"x" * (size - 1) + b"\n" for size in sizes))
    found = [[len(raw) for *_, raw in chunk.lines] for chunk in chunks_of(task(words, tmp_path, path), 0)]
    assert found == [[5, 5, 5], [5, 30], [30], [100], [5]]


@pytest.mark.parametrize("block", [None, 20])
def test_shares_rise_to_the_whole(words, tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "CHUNK_LINES", 4)
    files = [write(tmp_path / f"{name}.jsonl", [{"text": "x" * 9000}] * 20) for name in "ab"]
    for partition in range(2):
        given = task(words, tmp_path, *files, partitions=2, block=block)
        shares = [chunk.share for chunk in chunks_of(given, partition)]
        assert shares == sorted(shares) and shares[0] < 0.5 and shares[-1] == pytest.approx(1, abs=0.03)


def test_compressed_lines_are_the_same_lines(tmp_path):
    plain = write(tmp_path / "a.jsonl", [{"text": text} for text in texts_of(50)])
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [line[:2] for line in read_lines(str(packed))] == [line[:2] for line in read_lines(str(plain))]


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-30], lambda raw: b"text" + raw, lambda raw: raw[:40] + b"\xff" * 9 + raw[49:]]
)
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b"".join(b'{"n": %d}\n' % n for n in range(500)))))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: not gzip data, or damaged"):
        list(read_lines(str(path)))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="a: cannot be read: No such file"):
        list(read_lines(str(tmp_path / "a")))


# Tokens


def encode(words: Path, tmp_path: Path, *lines: bytes, **settings):
    chunk = Chunk([("a.jsonl", number, line) for number, line in enumerate(lines, 1)], 1.0)
    encoded = Encoder(task(words, tmp_path, **settings))(chunk)
    (tokens, lengths), tok = encoded.columns["text"], tokenizer()
    ends = np.cumsum([sum(parts) for parts in lengths], dtype=np.int64)
    return [tok.decode(part) for part in np.split(tokens, ends)[:-1]], lengths, encoded


def test_blank_lines_are_no_documents_and_empty_texts_are_empty_ones(words, tmp_path):
    found, lengths, encoded = encode(words, tmp_path, b'{"text": "a"}\n', b"\n", b'{"text": ""}\n', append_eod=True)
    assert found == ["a<|im_end|>", ""] and lengths == [[2], []]
    assert encoded.documents == 2 and encoded.size == 14 + 1 + 13


def test_sentences_are_sequences_and_the_last_ends_the_document(words, tmp_path):
    found, lengths, _ = encode(words, tmp_path, b'{"text": ["a", "", "b", "c"]}', b'{"text": []}', append_eod=True)
    assert found == ["abc<|im_end|>", ""] and lengths == [[1, 1, 2], []]


def test_special_tokens_stand_round_a_text_unless_they_are_not_wanted(tmp_path):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    core = type(tokenizer().backend_tokenizer).from_str(tokenizer().backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", core.token_to_id("<s>"))])
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "t")
    for wanted, expected in ((True, "<s>a</s>"), (False, "a</s>")):
        found, _, _ = encode(tmp_path / "t", tmp_path, b'{"text": "a"}', special_tokens=wanted, append_eod=True)
        assert found == [expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 5}', 'column "text" holds a number; expected a string'),
        (b'{"text": ["a", null]}', 'column "text" holds null'),
        (b'{"txt": "a"}', 'no column "text"; found txt; set --json-keys'),
        (b"{}", 'no column "text"; found none'),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "a', "not valid JSON"),
        (b"[1]", "expected an object with columns, found a list"),
        (b'{"text": "\xff"}', "not UTF-8 text"),
        (b'{"text": "a\0"}', "a NUL byte"),
    ],
)
def test_a_wrong_line_is_told_with_its_place(words, tmp_path, line, message):
    with pytest.raises(DataError) as caught:
        encode(words, tmp_path, b'{"text": "a"}\n', line)
    assert str(caught.value).startswith("a.jsonl:2: ") and message in str(caught.value)


# Progress


def meter(tool, times, *, partitions=1, interval=10, terminal=False):
    out = io.StringIO()
    clock = iter(times)
    console = Console(file=out, width=200, force_terminal=terminal, highlight=False)
    return tool.Meter(partitions, interval, console, lambda: next(clock)), out


def test_progress_tells_documents_speed_and_what_is_left():
    told, out = meter(tool, [104.0, 110.0])
    with told:
        told.add(0, 5, 1_000_000, 0.1)
        told.add(0, 2, 1_000_000, 0.1)
        told.add(0, 16, 2_000_000, 0.3)
    assert out.getvalue() == "23 documents, 3 documents/s, 0.50 MB/s, 0:00:21 left\n"


def test_partitions_are_counted_together():
    told, out = meter(tool, [0.0, 60.0], partitions=2)
    told.add(0, 4, 0, 0.0)
    told.add(1, 24, 0, 0.02)
    assert out.getvalue() == "28 documents, 0 documents/s, 0.00 MB/s, 1:39:00 left\n"


def test_before_there_is_a_speed_documents_are_told_alone():
    told, out = meter(tool, [5.0, 5.0])
    told.add(0, 10, 100, 0.5)
    assert out.getvalue() == "10 documents\n"


def test_a_terminal_gets_a_bar():
    told, out = meter(tool, [0.0, 1.0, 2.0], terminal=True)
    with told:
        told.add(0, 10, 0, 0.25)
        told.add(0, 10, 0, 0.5)
    assert "50%" in out.getvalue() and "20 documents, 5 documents/s" in out.getvalue() and "━" in out.getvalue()
