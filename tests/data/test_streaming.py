"""A stream is as sure of its batches as data that is tokenised first, and holds little of it in memory."""

import io
import json
import os
import tracemalloc

import numpy as np
import pytest
from rich.console import Console

import jaxtune
from jaxtune.checkpoint import latest_valid
from jaxtune.config import DataSection, EvalSection, TrainSection, make_config
from jaxtune.data import streaming
from jaxtune.data.loader import build_data
from jaxtune.errors import ConfigError, DataError
from tests.data.templates import tokenizer, word_tokenizer
from tests.peer import CHATML, read_jsonl
from tests.runs import ROWS as ROWS_OF_RUNS
from tests.runs import sections, stopped_after

ROWS, BLOCK = 26, 10  # 3 blocks an epoch, the last a short one
WORDS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """stream(**section) -> the run's data; each row is one letter, and a token for its end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": letter}) + "\n" for letter in WORDS))

    def stream(steps=20, seed=0, eval: dict | None = None, **section):
        usual = {"path": "a.jsonl", "format": "text", "max_length": 4, "streaming": True, "shuffle_buffer": BLOCK}
        settings = DataSection.model_validate(usual | section)
        train = TrainSection(steps=steps, batch_size=2, seed=seed)
        return build_data(settings, EvalSection(**eval or {}), train, word_tokenizer())

    return stream


def letters(batches) -> str:
    """What the batches hold, row after row, without the tokens of ends."""
    tok = word_tokenizer()
    tokens = np.concatenate([batch.tokens[batch.segments > 0] for batch in batches])
    return "".join(tok.convert_ids_to_tokens([token for token in tokens.tolist() if token != tok.eos_token_id]))


def hashes(data, first: int = 1) -> list[str]:
    return [batch.sha256() for batch in data.train.batches(first)]


def test_each_epoch_has_every_row_once_block_by_block_and_shuffled_anew(stream):
    read = letters(stream(steps=14).train.batches())  # 4 rows of letters a step
    first, second = read[:ROWS], read[ROWS : 2 * ROWS]
    for epoch in (first, second):
        assert sorted(epoch[:BLOCK]) == list(WORDS[:BLOCK])
        assert sorted(epoch[BLOCK : 2 * BLOCK]) == list(WORDS[BLOCK : 2 * BLOCK])
        assert sorted(epoch) == list(WORDS)
    assert first != second and first[:BLOCK] != WORDS[:BLOCK]
    assert letters(stream(steps=6, shuffle=False, packing="in_order").train.batches()).startswith(WORDS[:22])
    assert not stream().train.one_each and stream(packing=False).train.one_each


def test_batches_depend_on_data_seed_and_step_alone(stream):
    whole = hashes(stream())
    assert hashes(stream()) == whole
    assert hashes(stream(seed=1)) != whole and hashes(stream(shuffle_buffer=9)) != whole
    data = stream()
    assert [data.train.batch(step).sha256() for step in (19, 3, 11, 20, 1)] == [
        whole[n - 1] for n in (19, 3, 11, 20, 1)
    ]
    part = data.train.batch(5, rows=(1,))
    assert np.array_equal(part.tokens[0, 1], data.train.batch(5).tokens[0, 1]) and not part.tokens[0, 0].any()


@pytest.mark.parametrize("noted", [True, False])
def test_a_run_that_goes_on_tokenises_only_what_is_left(stream, tmp_path, monkeypatch, noted):
    whole, seen = hashes(stream()), []
    if not noted:
        for path in (tmp_path / "cache" / "tokens").glob("*.jsonl"):
            path.unlink()
    encode = streaming.encode_chunk

    def counted(rows, *others):
        seen.extend(row.where for row in rows)
        return encode(rows, *others)

    monkeypatch.setattr(streaming, "encode_chunk", counted)
    assert hashes(stream(), 15) == whole[14:]
    in_all = 20 * 4 // 26 * 26  # letters of the steps
    assert len(seen) < in_all / 2 + 2 * BLOCK if noted else len(seen) >= in_all


def test_a_torn_note_costs_time_alone(stream, tmp_path):
    whole = hashes(stream())
    (note,) = (tmp_path / "cache" / "tokens").glob("*.jsonl")
    note.write_text(note.read_text()[:-7])
    assert hashes(stream(), 4) == whole[3:]


def test_notes_of_a_file_that_changed_in_its_middle_are_not_used(stream, tmp_path, monkeypatch):
    """Its fingerprint is that of its two ends."""
    monkeypatch.setattr(streaming, "EDGE", 30)
    path, usual = tmp_path / "a.jsonl", hashes(stream(packing=False))
    before, text = path.stat(), path.read_bytes()
    path.write_bytes(text[:98] + b" " * 97 + text[195:])  # seven rows less
    changed = hashes(stream(packing=False, cache=str(tmp_path / "anew")))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert hashes(stream(packing=False)) == changed != usual
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    told = r"block 1 became 9 rows of the stream, but 10 when .*changed since\. Put it back, or remove .*\.jsonl and"
    with pytest.raises(DataError, match=told):
        hashes(stream(packing=False))


def test_other_data_has_another_fingerprint(stream, tmp_path):
    before = stream().train.fingerprint
    assert stream().train.fingerprint == before
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "a"}\n')
    assert stream().train.fingerprint != before


def test_several_sources_come_one_after_another_in_their_formats(stream, tmp_path):
    row = {"instruction": "x", "output": "y z"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    texts = {"path": "a.jsonl", "format": "text"}
    mixed = {"path": [], "format": "alpaca", "sources": [texts, {"path": "b.jsonl"}], "max_length": 32}
    read = letters(stream(steps=1, shuffle_buffer=100, shuffle=False, packing="in_order", **mixed).train.batches())
    assert read.startswith(WORDS) and "y" in read[ROWS:]


@pytest.fixture
def mixed(stream, tmp_path):
    """mixed(**section) -> a stream out of two sources with weights, three rows of a to m for each of x to z."""
    for name, rows in {"long": WORDS[:13], "short": "xyz"}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": letter}) + "\n" for letter in rows))
    paths = {"long": 3, "short": 1}
    sources = [
        {"path": f"{name}.jsonl", "format": "text", "name": name, "weight": weight} for name, weight in paths.items()
    ]
    return lambda **section: stream(**{"path": [], "format": "alpaca", "sources": sources, "steps": 30} | section)


def test_weights_take_from_each_source_its_share_and_from_a_short_one_again_and_again(mixed):
    read = letters(mixed(shuffle=False, packing="in_order").train.batches())
    for end in range(len(read)):
        assert abs(sum(letter in "xyz" for letter in read[:end]) - end / 4) <= 1
    for rows in (WORDS[:13], "xyz"):
        own = [letter for letter in read if letter in rows]
        assert len(own) > 2 * len(rows)
        assert own == [rows[index % len(rows)] for index in range(len(own))], "in the order of its file"


def test_a_shuffled_block_has_the_shares_and_a_run_that_goes_on_has_the_same_blocks(mixed, tmp_path):
    read = letters(mixed().train.batches())
    blocks = [read[at : at + BLOCK] for at in range(0, len(read) - BLOCK, BLOCK)]
    assert all(sum(letter in "xyz" for letter in block) in (2, 3) for block in blocks)
    assert blocks[0] != letters(mixed(shuffle=False, packing="in_order").train.batches())[:BLOCK]
    whole = hashes(mixed())
    assert hashes(mixed(), 21) == whole[20:]
    for path in (tmp_path / "cache" / "tokens").glob("*.jsonl"):
        path.unlink()
    assert hashes(mixed(), 21) == whole[20:]


def test_weights_are_part_of_a_streams_fingerprint(mixed):
    other = [{"path": f"{name}.jsonl", "format": "text", "weight": 1} for name in ("long", "short")]
    without = [{"path": f"{name}.jsonl", "format": "text"} for name in ("long", "short")]
    assert len({mixed(**more).train.fingerprint for more in ({}, {"sources": other}, {"sources": without})}) == 3


@pytest.mark.parametrize("weighted", [True, False])
def test_a_batch_of_a_stream_counts_the_examples_of_each_source(mixed, weighted):
    names = ("long", "short")
    without = [{"path": f"{name}.jsonl", "format": "text", "name": name} for name in names]
    for batch in mixed(**({} if weighted else {"sources": without})).train.batches():
        read = letters([batch])
        short = sum(letter in "xyz" for letter in read)
        assert batch.sources == {"long": len(read) - short, "short": short}
    assert mixed().train.batch(3, rows=()).sources == {"long": 0, "short": 0}


def test_a_source_all_of_whose_rows_are_left_out_cannot_have_a_weight(mixed, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"instruction": "x"}\n')  # no answer: LLaMA-Factory leaves it out
    odd = {"path": "odd.jsonl", "dialect": "llamafactory", "weight": 1}
    with pytest.raises(DataError, match=r"data\.sources\.1\.path: no row to learn from"):
        mixed(sources=[{"path": "long.jsonl", "format": "text", "weight": 1}, odd])


def test_memory_does_not_grow_with_the_rows(stream, tmp_path):
    def peak(rows: int) -> int:
        (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n' * rows)
        steps = rows // 4
        tracemalloc.start()
        for _ in stream(steps=steps, max_length=8, shuffle_buffer=50).train.batches():
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(200)
    assert peak(4000) < 2 * peak(500)


def test_the_report_tells_of_the_first_block(stream):
    where = Console(width=150, record=True, file=io.StringIO())
    stream().report(where)
    text = where.export_text()
    assert "a.jsonl: the first 10 rows, none dropped" in text
    assert "20 steps of 2 sequences; what follows in the stream is not known yet" in text


def test_a_template_with_a_clock_is_told(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 3)
    section = {"path": str(tmp_path / "a.jsonl"), "template": str(tmp_path / "t.jinja"), "streaming": True}
    settings = DataSection.model_validate({**section, "cache": str(tmp_path / "cache")})
    data = build_data(settings, EvalSection(), TrainSection(steps=2, batch_size=2), tokenizer())
    assert any("always 26 July 2024" in note for note in data.notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": None}, "data.streaming: nobody knows how many rows an epoch has; set train.steps"),
        ({"eval": {"fraction": 0.1}}, "data.streaming: a share of rows that nobody has counted cannot be held out"),
        ({"num_samples": 3}, "data.path: num_samples chooses among all rows"),
        ({"path": "no.jsonl"}, "no.jsonl: cannot be read: No such file or directory"),
    ],
)
def test_what_needs_to_know_all_rows_and_what_is_not_there_is_refused(stream, settings, message):
    with pytest.raises((ConfigError, DataError), match=message):
        stream(**settings)


def test_a_first_block_of_which_nothing_is_left_is_told_with_its_reasons(stream, tmp_path):
    long = json.dumps({"text": "b " * 99}) + "\n"
    (tmp_path / "a.jsonl").write_text(long * 2 + (tmp_path / "a.jsonl").read_text())
    told = r"first 2 rows: 2 are longer than data\.max_length 4.*raise data\.max_length\. A larger data\.shuffle_buffer"
    with pytest.raises(DataError, match=told):
        stream(too_long="drop", shuffle_buffer=2)
    assert stream(too_long="drop", shuffle_buffer=3).train.batch(1).tokens.size
    (tmp_path / "a.jsonl").write_text(long * 2)
    with pytest.raises(DataError, match=r"token in 2 rows: 2 are longer.*raise data\.max_length$"):
        stream(too_long="drop", shuffle_buffer=3)


def test_a_row_that_is_too_long_is_refused_in_whichever_block_it_comes(stream, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*WORDS[:14], "a b c d e"]))
    data = stream(too_long="error")
    data.train.batch(2)
    with pytest.raises(
        DataError, match=r"1 of 5 rows of a block are longer than data.max_length 4, the first a.jsonl:15: 6 tok"
    ):
        hashes(data)


@pytest.mark.parametrize(("good", "told"), [(2, "6 of 9 rows"), (0, "8 of 9 rows")])
def test_too_many_bad_rows_are_told_when_their_block_is_read(stream, tmp_path, good, told):
    """And few that come first are not too many."""
    one = json.dumps({"text": "a"})
    (tmp_path / "a.jsonl").write_text("\n".join(["{"] * 3 + [one] * 3))
    assert stream(on_bad_line="skip", shuffle_buffer=3).train.batch(4).tokens.size
    (tmp_path / "a.jsonl").write_text("\n".join([one] + ["{"] * 6 + [one] * good + ["{"] * 9 + [one] * 9))
    with pytest.raises(DataError, match=rf"^data\.path: too many bad rows, {told}: a\.jsonl:2: "):
        stream(on_bad_line="skip", shuffle_buffer=3)


@pytest.mark.parametrize(
    ("row", "says", "option", "value"),
    [
        ("{", r"data\.jsonl:71: not valid JSON", "on_bad_line", "skip"),
        (json.dumps({"instruction": "a", "output": "b " * 99}), r"the first .*data\.jsonl:71: ", "too_long", "drop"),
    ],
    ids=["bad", "long"],
)
def test_a_run_that_met_a_bad_row_goes_on_without_it(
    tiny_model, tmp_path, monkeypatch, capsys, row, says, option, value
):
    """As one that left such rows out from the start."""
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    lines, ledgers = [*map(json.dumps, 4 * ROWS_OF_RUNS)], []
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:70], row, *lines[70:]]))
    stream = {"streaming": True, "shuffle_buffer": 7, "too_long": "error"}
    for name in ("whole", "met"):
        settings = sections(tiny_model("qwen2"), tmp_path / name, steps=12, data=stream)
        settings["data"]["path"] = str(tmp_path / "data.jsonl")
        if name == "met":
            with pytest.raises(DataError, match=says):
                jaxtune.train(settings)
            assert latest_valid(tmp_path / name / "run" / "checkpoints")
        settings["data"][option] = value
        jaxtune.train(settings)
        ledgers.append(read_jsonl(tmp_path / name / "run" / "ledger.jsonl"))
    assert f"data.{option}: was error, now {value}" in capsys.readouterr().out
    assert ledgers[0] == ledgers[1] and len(ledgers[0]) == 12


def test_held_out_rows_are_read_as_ever(stream, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    data = stream(eval={"path": "held.jsonl"})
    assert data.eval is not None and letters(data.eval.batches()) == "ab"


def test_a_run_that_is_stopped_goes_on_to_the_same_ledger(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    data = {"streaming": True, "shuffle_buffer": 7}
    ledgers = []
    for name in ("whole", "cut"):
        settings = sections(tiny_model("qwen2"), tmp_path / name, steps=9, data=data)
        settings["data"]["path"] = str(tmp_path / "whole" / "data.json")
        if name == "cut":
            with pytest.raises(SystemExit):
                stopped_after(5, make_config(settings))
        jaxtune.train(settings)
        ledgers.append(read_jsonl(tmp_path / name / "run" / "ledger.jsonl"))
    assert ledgers[0] == ledgers[1] and len(ledgers[0]) == 9
