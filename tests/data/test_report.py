"""The report: what a person needs to know of the data, with and without colours."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxtune.config import DataSection, EvalSection, TrainSection
from jaxtune.data import build_data
from jaxtune.data.report import marked
from tests.data.templates import PLAIN, say, tokenizer, word_tokenizer


def console(**settings) -> Console:
    return Console(file=io.StringIO(), width=80, **settings)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """report(rows, ...) -> the text, without a terminal unless one is asked for."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def report(*rows: dict, where: Console | None = None, tok=None, eval=None, train=None, **section) -> str:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = DataSection(path="a.jsonl", **{"max_length": 64, **section}), EvalSection(**eval or {})
        where = where or console()
        build_data(*made, TrainSection(**train or {}), tok or word_tokenizer()).report(where)
        return where.file.getvalue()

    return report


def row(answer: str = "b c", question: str = "a", **more) -> dict:
    return {"instruction": question, "output": answer, **more}


def cells(text: str) -> dict[str, list[str]]:
    """The table's lines: label -> numbers."""
    lines = [line.rsplit("  ", line.count("  ")) for line in text.splitlines() if "  " in line]
    return {parts[0].strip(): [part.strip() for part in parts[1:] if part.strip()] for parts in lines}


def test_held_out_rows_of_another_length_have_a_line_of_their_own(report, tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps(row("c " * 100)))
    found = cells(report(*[row()] * 6, eval={"path": "b.jsonl"}, packing=False, max_length=500))
    assert (found["rows of 64 tokens"], found["rows of 128 tokens"]) == (["6"], ["1"])
    assert len(found["padding"]) == 2


def test_the_numbers_are_those_of_the_data(report):
    text = report(*[row()] * 6, row("b c d e"), train={"batch_size": 2, "epochs": 3})
    assert text.startswith("a.jsonl: 7 rows, none dropped, none truncated\n")
    found = cells(text)
    assert found["conversations"] == ["7"]
    assert found["tokens"] == ["65"]  # six of 9, one of 11
    assert found["mean length"] == ["9.3"]
    assert found["longest"] == ["11"]
    assert found["supervised"] == ["35.4%"]  # 23 of 65
    assert found["packs of 64 tokens"] == ["2"]
    assert found["padding"] == ["49.2%"]  # 63 of 128
    assert "3 steps of 2 sequences: 1 an epoch, 3 epochs\n" in text
    assert "Note" not in text


def test_unpacked_rows_are_called_rows(report):
    found = cells(report(row(), row(), packing=False))
    assert found["rows of 64 tokens"] == ["2"] and found["padding"] == ["85.9%"]


def test_held_out_data_has_a_column(report):
    found = cells(report(*[row()] * 10, eval={"fraction": 0.2}))
    assert found["conversations"] == ["8", "2"]


def test_what_was_dropped_and_cut_is_said_with_the_reason(report):
    long, deep = row("b " * 90), row("b", "a " * 90)
    text = report(row(), long, long, deep)
    assert text.startswith("a.jsonl: 4 rows, 1 dropped (1 cut before anything supervised), 2 truncated\n")
    text = report(row(), long, deep, too_long="drop")
    assert text.startswith("a.jsonl: 3 rows, 2 dropped (2 longer than 64 tokens), none truncated\n")
    rows = {"messages": say("a", "b")}, {"messages": say("a")}
    text = report(*rows, format="messages")
    assert text.startswith("a.jsonl: 2 rows, 1 dropped (1 without a supervised token), none truncated\n")


def test_what_may_be_a_mistake_is_noted(report):
    text = report(row(context="c"), row(""), row(context="d"), row(" \n"))
    assert 'Note: Columns that are not read: "context" (in 2 rows); data.columns says which are.\n' in text
    assert (
        "Note: Rows with an empty answer: 2, the first is a.jsonl:2; of such a turn only the end is learnt, which is "
        "to say nothing.\n"
    ) in text
    glued = report(row("Ada."), tok=tokenizer(PLAIN.replace(":\n", ": "), trim_offsets=False))
    assert "Note: In 1 assistant turns the prompt and the answer share a token" in glued


def test_a_small_part_of_an_epoch_is_not_told_as_none(report):
    text = report(*[row()] * 60, packing=False, train={"batch_size": 1, "steps": 1})
    assert "1 step of 1 sequences: 60 an epoch, 0.02 epochs\n" in text


def test_a_step_that_goes_through_the_data_several_times_is_noted(report):
    text = report(*[row()] * 8, train={"batch_size": 3, "epochs": 6})
    note = "One step trains on every row 1.5 times: an epoch has 2 packs, and train.batch_size is 3; lower it."
    assert f"Note: {note}\n" in text
    assert "trains on every row" not in report(*[row()] * 8, train={"batch_size": 2, "epochs": 6})
    assert "trains on every row" not in report(row(), row(), packing=False, train={"batch_size": 2})
    assert "an epoch has 1 row, and" in report(row(), packing=False, train={"batch_size": 2})


def test_a_stream_counts_the_rows_of_its_first_block_once(report):
    """Which is all of it here, so that the next epoch's rows are read too."""
    text = report(row(""), row(context="d"), {}, on_bad_line="skip", streaming=True, train={"steps": 1})
    assert "Rows with an empty answer: 1, the first is a.jsonl:1;" in text
    assert '"context" (in 1 rows)' in text and "Bad rows that were left out: 1 of 3 rows: a.jsonl:3: " in text
    text = report(row(""), {}, *[row("")] * 9, on_bad_line="skip", streaming=True, shuffle_buffer=4, train={"steps": 1})
    assert "Rows with an empty answer: 4," in text and "1 of 5 rows: a.jsonl:2: " in text


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_holds_a_special_token_is_noted(report, streaming):
    rows = row(), row(question="a <|im_end|>\n<|im_start|> system\nb"), row("c <|im_end|>"), row("<im_end>")
    for _ in range(2):  # made, and out of the cache
        text = report(*rows, streaming=streaming, train={"steps": 1})
        note = "Rows whose text holds a special token: 2, the first is a.jsonl:2 (<|im_end|>); the model sees it as the"
        assert f"Note: {note} template's own, where a turn ends or begins.\n" in text
    assert "special token" not in report(rows[0], rows[3])


def test_the_example_is_marked_with_brackets_where_there_is_no_colour(report):
    text = report(row("Ada.", "Who [bold]are[/bold] you?"), tok=tokenizer())
    assert "the loss is on what stands between « and »:\n" in text
    assert text.endswith(
        "<|im_start|>user\nWho [bold]are[/bold] you?<|im_end|>\n<|im_start|>assistant\n«Ada.<|im_end|>»\n\n\n"
    )


def test_the_example_is_coloured_in_a_terminal(report):
    text = report(row("Ada."), tok=tokenizer(), where=console(force_terminal=True, color_system="truecolor"))
    assert "\x1b[1;32min bold green\x1b[0m" in text
    assert "\x1b[1;32mAda.<|im_end|>\x1b[0m" in text
    assert "«" not in text


def test_a_terminal_without_colours_gets_brackets(report):
    text = report(row("Ada."), tok=tokenizer(), where=console(force_terminal=True, no_color=True))
    assert "«Ada.<|im_end|>»" in text


def test_lines_are_not_broken_for_a_narrow_pipe(report):
    text = report(row("word " * 40), tok=tokenizer(), max_length=500)
    assert ("word " * 40).strip() in text


def mark(mask: list[int], **settings) -> str:
    tok = word_tokenizer()
    tokens = np.array(tok.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"[: len(mask)])))
    return marked(tokens, np.array(mask, bool), tok, False, **settings).plain


def test_runs_are_marked_apart():
    assert mark([0, 1, 1, 0, 1]) == "a«b c»d«e»"
    assert mark([1, 1]) == "«a b»"
    assert mark([0, 0]) == "a b"


def test_a_long_example_is_cut_in_the_middle():
    assert mark([0] * 8 + [1] * 2, shown=4) == "a b [... 6 tokens more ...] «i j»"
    assert mark([0] * 4, shown=4) == "a b c d"


def test_characters_of_several_tokens_come_out_whole():
    tok = tokenizer()
    tokens = np.array(tok.encode("小主😀 né"))
    assert marked(tokens, np.ones(len(tokens), bool), tok, False).plain == "«小主😀 né»"
