"""The preview: what it shows is the batch, token by token, and nothing in the data can break out of it."""

import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxtune import cli
from jaxtune.assemble import Source
from jaxtune.config import DataSection, EvalSection, TrainSection, load_config
from jaxtune.data import build_data
from jaxtune.data.preview import Document, SeenRow, Token, look, pieces, print_rows, visible
from jaxtune.data.preview_html import page
from tests.data.templates import say, tokenizer, word_tokenizer

HOSTILE = "</div><script>alert(1)</script><!-- \x1b[2J\x00\x9b31m \u202e \"' &amp; <b>"


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """rows(*conversations, ...) -> the rows that a run would train on, looked at; one batch of them."""
    monkeypatch.chdir(tmp_path)

    def rows(*conversations, tok=None, batch_size=1, virtual=range(0), **section):
        tok = tok or word_tokenizer()
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
        section = DataSection(path="a.jsonl", format="messages", **{"max_length": 64, "shuffle": False, **section})
        train = TrainSection(batch_size=batch_size, epochs=1)
        data = build_data(section, EvalSection(), train, tok, virtual)
        return list(look(data.train.batch(1), tok, virtual)), data.train.batch(1)

    return rows


def written(seen, packs=True, **settings) -> str:
    console = Console(file=io.StringIO(), width=40, **settings)
    print_rows(seen, "conversation", packs, console)
    return console.file.getvalue()


TALKS = say("a", "b c"), say("d", "e", "f", "g h i", system="j"), say("k", "l")


def test_what_is_looked_at_is_the_batch(rows):
    seen, batch = rows(*TALKS, batch_size=2, max_length=32)
    arrays = {name: array[0] for name, array in batch.arrays().items()}
    assert len(seen) == 2
    for number, row in enumerate(seen):
        tokens = [token for document in row.documents for token in document.tokens]
        used = len(tokens)
        assert [token.id for token in tokens] == arrays["tokens"][number, :used].tolist()
        assert [token.position for token in tokens] == arrays["positions"][number, :used].tolist()
        assert [token.target is not None for token in tokens] == arrays["mask"][number, :used].tolist()
        assert [token.target or 0 for token in tokens] == arrays["targets"][number, :used].tolist()
        segments = [document.number for document in row.documents for _ in document.tokens]
        assert segments == arrays["segments"][number, :used].tolist()
        assert row.padding == 32 - used
        starts = np.flatnonzero(np.diff(arrays["segments"][number, :used], prepend=0)).tolist()
        assert [document.start for document in row.documents] == starts


def test_a_token_is_supervised_where_the_one_before_has_it_as_its_target(rows):
    (row,), _ = rows(TALKS[1])
    tokens = row.documents[0].tokens
    assert [token.text.strip() for token in tokens if token.supervised] == ["e", "<|im_end|>", *"ghi", "<|im_end|>"]
    assert [b.id for a, b in pairwise(tokens) if a.target is not None] == [b.id for b in tokens if b.supervised]


def test_each_turn_is_counted_apart(rows):
    (row,), _ = rows(*TALKS, batch_size=1, max_length=64)
    assert [document.turns for document in row.documents] == [[3], [2, 4], [2]]
    assert row.documents[1].caption("conversation 2") == (
        "conversation 2: 22 tokens, positions 0 to 21, 6 supervised in 2 turns: 2 + 4"
    )
    assert row.caption(packs=True) == "Row 1: 39 tokens, 11 supervised (28.2%), 25 padding"
    assert row.caption(packs=False) == "Row 1: 39 tokens, 11 supervised (28.2%)"


def test_empty_rows_at_the_end_are_left_out(rows):
    seen, batch = rows(*TALKS, batch_size=8, packing=False)
    assert batch.tokens.shape[1] == 8
    assert [row.number for row in seen] == [1, 2, 3]


def test_virtual_tokens_stand_apart_and_are_no_text(rows):
    (row,), _ = rows(TALKS[0], virtual=range(900, 903))
    tokens = row.documents[0].tokens
    assert [(token.virtual, token.text) for token in tokens[:4]] == [(True, "")] * 3 + [(False, "<|im_start|>")]
    assert "\n[3 virtual tokens]<|im_start|>" in written([row])
    assert page([row], "conversation", True, {}).count('class="vt"') == 3


# --- texts of tokens ---


@pytest.mark.parametrize("text", ["小主，您又起来了？😀", "né e\u0301 🇫🇷 a\n\tb  c", "", "plain words", "\ufffd"])
def test_the_pieces_joined_are_the_text(text):
    tok = tokenizer()
    ids = tok.encode(text)
    assert len(pieces(tok, ids)) == len(ids)
    assert "".join(pieces(tok, ids)) == text


def test_a_character_of_several_tokens_stands_at_the_last_of_them():
    tok = tokenizer()
    found = pieces(tok, tok.encode("😀a"))
    assert found[-1] == "a" and found[-2] == "😀" and set(found[:-2]) == {""}


def test_bytes_that_are_no_character_do_not_swallow_the_rest():
    tok = tokenizer()
    broken = tok.encode("😀")[:1] * 40 + tok.encode("after")
    assert "".join(pieces(tok, broken)).endswith("after")
    assert len(pieces(tok, broken)) == len(broken)


def test_control_characters_are_shown_and_do_nothing():
    assert visible("a\x1b[2J\x00\x7f\x9b\r\n\tb") == "a␛[2J␀␡\ufffd␍\n\tb"


# --- in the terminal ---


def test_supervised_text_is_between_brackets_where_there_is_no_colour(rows):
    seen, _ = rows(TALKS[0], tok=tokenizer())
    assert written(seen) == (
        "\nRow 1: 21 tokens, 4 supervised (19.0%), 43 padding\n"
        "── conversation 1: 21 tokens, positions 0 to 20, 4 supervised\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b c<|im_end|>»\n\n\n"
    )


def test_supervised_text_is_green_in_a_terminal(rows, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    seen, _ = rows(TALKS[0], tok=tokenizer())
    text = written(seen, force_terminal=True, color_system="truecolor")
    assert "\x1b[1;32mb c<|im_end|>\x1b[0m" in text
    assert "\x1b[2m<|im_start|>user" in text
    assert "«" not in text


def test_one_by_one_a_row_is_its_conversation(rows):
    seen, _ = rows(*TALKS, batch_size=8, packing=False)
    text = written(seen, packs=False)
    assert [line for line in text.splitlines() if line.startswith(("──", "Row"))] == [
        "── conversation 1: 9 tokens, positions 0 to 8, 3 supervised",
        "── conversation 2: 22 tokens, positions 0 to 21, 6 supervised in 2 turns: 2 + 4",
        "── conversation 3: 8 tokens, positions 0 to 7, 2 supervised",
    ]


def test_the_data_cannot_steer_the_terminal(rows):
    seen, _ = rows(say("a", HOSTILE), tok=tokenizer(), max_length=256)
    assert "\x1b" not in written(seen) and "\x9b" not in written(seen)


# --- the page ---


class Page(HTMLParser):
    """The tags, and the texts and hints of the tokens."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.shown, self.hints, self.classes, self._inside = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._inside = tag == "i" and "data-t" in dict(attributes)
        if self._inside:
            self.hints.append(dict(attributes)["data-t"])
            self.classes.append(dict(attributes).get("class", ""))
            self.shown.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.shown[-1] += data


def test_each_token_of_the_page_tells_what_is_known_of_it(rows):
    (row,), _ = rows(*TALKS)
    found = Page(page([row], "conversation", True, {}))
    tokens = [token for document in row.documents for token in document.tokens]
    assert len(found.hints) == len(tokens)
    assert ["on" in names.split() for names in found.classes] == [token.supervised for token in tokens]
    answer = next(hint for hint in found.hints if hint.startswith("' b'"))
    b, c = word_tokenizer().convert_tokens_to_ids(["b", "c"])
    assert f"id {b} · position 6 · place 6 · segment 1 · target {c} ' c'" in answer
    second = found.hints[len(row.documents[0].tokens)]
    assert "position 0 · place 9 · segment 2 · no target" in second


def test_nothing_in_the_data_becomes_part_of_the_page(rows):
    (row,), _ = rows(say(HOSTILE, HOSTILE), tok=tokenizer(), max_length=512)
    harmless, _ = rows(say("a", "b"), tok=tokenizer())
    text = page([row], "<x>", True, {"data": HOSTILE})
    plain = Page(page(harmless, "conversation", True, {"data": "a.jsonl"}))
    assert set(Page(text).tags) == set(plain.tags) and "script" not in Page(text).tags
    assert "\x1b" not in text and "\0" not in text
    joined = "".join(Page(text).shown).replace("▪", "")
    assert joined.count(visible(HOSTILE)) == 2


def test_a_token_is_escaped_in_its_text_and_in_its_hint():
    token = Token(7, "<i x>&\"'", 0, False, False, False, 9)
    text = page([SeenRow(1, [Document(1, 0, [token])], 0)], "conversation", True, {})
    assert "<i x>" not in text and "<i x>&\"'" in Page(text).shown
    assert len(Page(text).hints) == 1 and "<i x>&" in Page(text).hints[0]


def test_the_page_stands_alone(rows):
    text = page(rows(*TALKS)[0], "conversation", True, {})
    assert not re.search(r"<(script|link|img|iframe)|https?:|@import|url\(", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_the_map_has_the_lengths_of_the_stretches(rows):
    (row,), _ = rows(*TALKS)
    text = page([row], "conversation", True, {})
    lengths = [int(n) for n in re.findall(r'style="flex:(\d+)"', text)]
    assert lengths == [6, 3, 10, 2, 6, 4, 6, 2, row.padding] and sum(lengths) == 64
    assert [int(n) for n in re.findall(r'class="h\d on" style="flex:(\d+)"', text)] == [3, 2, 4, 2]


def test_line_breaks_and_tabs_can_be_seen(rows):
    (row,), _ = rows(say("a", "b\n\tc"), tok=tokenizer())
    shown = "".join(Page(page([row], "conversation", True, {})).shown)
    assert "b↵\n⇥\tc" in shown


# --- the command ---


@pytest.fixture
def call(tmp_path, tiny_model, monkeypatch, capsys):
    """call(*options, tune=...) -> (exit code, stdout, stderr), for three conversations and a model without weights."""
    from jaxtune.console import console

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    for file in tiny_model("qwen2").iterdir():
        if file.suffix != ".safetensors":
            (home / file.name).write_bytes(file.read_bytes())
    capsys.readouterr()
    (home / "data.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))

    def call(*options, **sections):
        tree = {
            "model": {"path": str(home)},
            "data": {"path": "data.jsonl", "format": "messages", "max_length": 128},
            **sections,
        }
        (home / "c.yaml").write_text(json.dumps(tree))
        monkeypatch.setattr(console, "stderr", False)
        with pytest.raises(SystemExit) as left:
            cli.main(["preview", "--config", "c.yaml", *map(str, options)])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


def test_the_command_shows_rows_and_reads_no_weights(call):
    code, out, err = call("--rows", 2)
    assert (code, err) == (0, "")
    assert out.count("── conversation ") == 2
    assert "«b c<|im_end|>»" in out and "«g h i<|im_end|>»" in out and "«l<|im_end|>»" not in out
    assert out.endswith("2 of 3 rows of the first epoch\n")


@pytest.mark.parametrize("options", [[], ["--packs"], ["--packs", "data.streaming=true", "train.steps=2"]])
def test_the_command_tells_of_the_data_what_the_run_does(call, options):
    with open("data.jsonl", "a") as file:
        file.write(json.dumps({"messages": say("a", "b c " * 190)}) + "\n" + json.dumps({"messages": say("a")}) + "\n")
    code, out, _ = call(*options, "train.batch_size=2", "data.system=s")
    config = load_config("c.yaml", [*options[1:], "train.batch_size=2", "data.system=s"])
    console = Console(file=io.StringIO(), width=80)
    tokenizer = Source.open(config.model, None, config.tune, weights=False).tokenizer
    build_data(config.data, config.eval, config.train, tokenizer).report(console)
    summary = console.file.getvalue().partition("\nOne example")[0]
    assert "5 rows, 1 dropped (1 without a supervised token), 1 truncated" in summary
    assert code == 0 and summary in out and "One example" not in out
    assert out.index(summary) < out.index("── conversation ")


def test_with_packs_it_shows_the_rows_of_the_run(call):
    code, out, _ = call("--packs")
    assert code == 0
    assert re.search(r"\nRow 1: 92 tokens, 14 supervised \(15\.2%\), 36 padding\n", out), out
    assert out.count("── conversation ") == 3
    assert out.endswith("1 of 1 rows of the first epoch\n")


def test_a_page_is_written_in_place_of_the_rows(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, _ = call("--html", "~/p.html", "data.max_length=64")
    assert code == 0
    assert "«" not in out and "~/p.html: 3 of 3 rows of the first epoch" in out
    assert len(Page((tmp_path / "p.html").read_text(encoding="utf-8")).hints) > 40


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is Linux's")
def test_a_page_that_the_disk_has_no_room_for_is_told_and_leaves_nothing(call, tmp_path):
    (tmp_path / "p.html.partial").symlink_to("/dev/full")
    code, _, err = call("--html", tmp_path / "p.html")
    assert (code, err) == (1, f"--html {tmp_path / 'p.html'}: cannot be written: No space left on device\n")
    assert not [path for path in tmp_path.iterdir() if "html" in path.name]


def test_a_page_is_written_over_and_no_other_file(call, tmp_path):
    for name in ("c.yaml", "data.jsonl"):
        code, out, err = call("--html", name)
        assert (code, out) == (2, "")
        assert err == f"--html {name}: is there already and is no page of preview's; give another name\n"
    assert load_config("c.yaml", []).data.path == "data.jsonl" and "messages" in Path("data.jsonl").read_text()
    (tmp_path / "p.html").touch()
    for rows in ("1", "2"):
        code, out, _ = call("--html", tmp_path / "p.html", "--rows", rows)
        assert code == 0 and f"p.html: {rows} of 3 rows" in out


def test_an_example_that_is_longer_than_the_model_knows_positions_is_told_as_a_run_tells_it(call):
    Path("data.jsonl").write_text(json.dumps({"messages": say("a", "b c " * 190)}) + "\n")
    code, out, _ = call("data.max_length=300")
    assert code == 0 and "Warning: data.max_length: the longest example has 300 tokens" in out
    assert "lower data.max_length to 256" in out


def test_a_page_of_a_stream_says_that_its_rows_are_of_a_block(call, tmp_path):
    options = ("--html", tmp_path / "p.html", "--packs", "data.streaming=true", "train.steps=2")
    code, out, _ = call(*options)
    assert code == 0
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "rows of the first block" in page and "epoch" not in page + out


def test_virtual_tokens_of_the_method_are_shown(call):
    code, out, _ = call("--rows", 1, tune={"method": "prompt", "num_virtual_tokens": 5})
    assert code == 0
    assert "[5 virtual tokens]<|im_start|>user" in out


def test_a_gguf_does_as_a_model(call, tiny_model, tmp_path):
    from tests.gguf_peer import write_gguf

    write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"))
    code, out, _ = call("--rows", 1, model={"path": str(tmp_path / "m.gguf")})
    assert code == 0
    assert "«b c<|im_end|>»" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["data.pth=x"], "data.pth: unknown key"),
        (["data.path=none.jsonl"], "none.jsonl: cannot be read: No such file or directory"),
        (["model.path=./none"], "./none: no such file or directory"),
        (["data.columns.messages=talk"], 'data.jsonl:1: no column "talk"; found messages'),
        (["--html", "no/where.html"], "--html no/where.html: cannot be written: No such file or directory"),
        (["data.template=none.jinja"], "none.jinja"),
        (["--rows", "0"], "Invalid value for '--rows'"),
    ],
)
def test_what_is_wrong_is_one_message_and_code_2(call, options, says):
    code, _, err = call(*options)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
