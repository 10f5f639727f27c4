"""The token cache: made once, never half made, another entry for whatever changes the tokens."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxtune.config import DataSection, EvalSection, TrainSection
from jaxtune.data import build_data, cache, encode, tokenise
from jaxtune.data.formats import read_rows
from jaxtune.data.template import ChatTemplate
from jaxtune.data.worker import hello
from jaxtune.errors import ConfigError, DataError
from tests.conftest import child_environment
from tests.data.templates import MARKED, MISTRAL, say, tokenizer, word_tokenizer
from tests.peer import CHATML

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def rows(count: int, first: int = 0) -> str:
    words = [" ".join(LETTERS[(n * k) % 26] for k in range(1 + n % 9)) for n in range(first, first + count)]
    return "".join(json.dumps({"instruction": LETTERS[n % 26], "output": text}) + "\n" for n, text in enumerate(words))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The cache's directory; the data is a.jsonl in the current one."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(rows(40))
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "caches"))
    return tmp_path / "caches" / "tokens"


def build(
    path="a.jsonl", *, tok=None, eval: dict | None = None, train: dict | None = None, virtual=range(0), **section
):
    made = DataSection(path=path, **{"max_length": 64, **section}), EvalSection(**eval or {})
    return build_data(*made, TrainSection(**{"epochs": 1, **(train or {})}), tok or word_tokenizer(), virtual)


def entries(home: Path) -> list[Path]:
    return sorted(path for path in home.iterdir() if path.is_dir())


@pytest.fixture
def no_reading(monkeypatch):
    """no_reading(): from now on it is a mistake to read a data file."""

    def forbid():
        def read(*_):
            raise AssertionError("a row was read")

        monkeypatch.setattr(tokenise, "stream_rows", read)

    return forbid


def test_a_copy_of_the_data_is_told_of_under_its_own_name(home, no_reading):
    long = json.dumps({"instruction": "a", "output": "b " * 99}) + "\n"
    Path("a.jsonl").write_text(rows(4) + '{"instruction": "a", "output": ""}\n{"instruction": 3}\n' + long)
    first = build(on_bad_line="skip", too_long="drop").sources[0].rows
    assert first.bad_first[0].startswith("a.jsonl:6: ") and first.empty_first == "a.jsonl:5"
    shutil.copyfile("a.jsonl", "b.jsonl")
    no_reading()
    source = build("b.jsonl", on_bad_line="skip", too_long="drop").sources[0]
    assert source.rows.bad_first == [text.replace("a.jsonl", "b.jsonl") for text in first.bad_first]
    assert source.rows.empty_first == "b.jsonl:5" and source.lengths.first_long[1] == "b.jsonl:7"


def test_a_second_start_reads_no_row_and_says_the_same(home, no_reading, capsys):
    from rich.console import Console

    Path("a.jsonl").write_text(rows(40) + '{"instruction": "a", "output": "", "extra": 1}\n')
    first = build(max_length=12)
    first.report(Console(width=200))
    told = capsys.readouterr().out
    no_reading()
    second = build(max_length=12)
    second.report(Console(width=200))
    assert capsys.readouterr().out == told
    assert '"extra" (in 1 rows)' in told and "Rows with an empty answer: 1" in told and "truncated" in told
    assert second.sources[0].lengths == first.sources[0].lengths
    assert second.train.fingerprint == first.train.fingerprint


def test_notes_on_the_template_are_kept(home, no_reading):
    Path("t.jinja").write_text(MARKED.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}"))
    Path("t.jinja").write_text(Path("t.jinja").read_text() + "{{ '' if true else strftime_now('%Y') }}")
    first = build(tok=tokenizer(), template="t.jinja")
    no_reading()
    assert first.notes and build(tok=tokenizer(), template="t.jinja").notes == first.notes


def test_tokens_are_those_that_are_made_without_a_cache(home):
    made = build().train
    section = DataSection(path="a.jsonl", max_length=64)
    with ChatTemplate(CHATML, {}, "the template") as template:
        examples, _ = encode.encode(read_rows(section).rows, section, word_tokenizer(), template)
    for name in ("tokens", "supervised", "starts"):
        np.testing.assert_array_equal(getattr(made.examples, name), getattr(examples, name))
    assert made.examples.tokens.dtype == np.uint16
    assert made.batch(1).tokens.dtype == np.int32


def test_ids_of_a_large_vocabulary_are_kept_whole(home, monkeypatch):
    monkeypatch.setattr(cache, "vocabulary_size", lambda _: 1 << 17)
    data = build()
    assert data.train.examples.tokens.dtype == np.int32
    shutil.rmtree(home)
    monkeypatch.undo()
    os.chdir(home.parent.parent)
    assert build(cache=str(home)).train.fingerprint == data.train.fingerprint


def test_whatever_changes_the_tokens_has_an_entry_of_its_own(home):
    Path("t.jinja").write_text(CHATML.replace("<|im_end|>", " z <|im_end|>"))
    other = tokenizer()
    build()
    ways = [
        {"max_length": 63},
        {"too_long": "drop"},
        {"train_on_prompt": True},
        {"template": "t.jinja"},
        {"system": "a b"},
        {"columns": {"instruction": "output", "output": "instruction"}},
        {"virtual": range(1000, 1002)},
        {"tok": other},
        {"path": ["a.jsonl", "a.jsonl"]},
        {"path": "a.jsonl", "format": "text", "columns": {"text": "output"}},
    ]
    for number, way in enumerate(ways, 2):
        build(**way)
        assert len(entries(home)) == number, way
    Path("t.jinja").write_text(CHATML.replace("<|im_end|>", " y <|im_end|>"))
    build(template="t.jinja")
    Path("a.jsonl").write_text(rows(39) + rows(1, first=7))
    build()
    assert len(entries(home)) == len(ways) + 3


def test_what_does_not_change_them_has_not(home, no_reading):
    build()
    shutil.copy("a.jsonl", "b.jsonl")
    no_reading()
    for way in ({"packing": False}, {"shuffle": False}, {"path": "b.jsonl"}, {"train": {"seed": 5, "batch_size": 2}}):
        build(**way)
    padded = word_tokenizer()
    padded(["a", "a b c"], padding=True)
    build(tok=padded)
    assert len(entries(home)) == 1


def test_code_that_makes_tokens_is_part_of_the_key(home, monkeypatch):
    build()
    monkeypatch.setattr(cache, "_code", lambda: "another")
    build()
    assert len(entries(home)) == 2


def test_sources_are_kept_apart(home, no_reading):
    """A change of one costs nothing for the other, and held-out files are kept too."""
    Path("b.jsonl").write_text(rows(7))
    build(eval={"path": "b.jsonl"})
    no_reading()
    both = build_data(
        DataSection(sources=[{"path": "b.jsonl"}, {"path": "a.jsonl", "name": "x"}], max_length=64),
        EvalSection(),
        TrainSection(epochs=1),
        word_tokenizer(),
    )
    assert len(both.train.examples) == 47 and len(entries(home)) == 2


@pytest.mark.parametrize("name", [cache.TOKENS, cache.SUPERVISED, cache.STARTS, cache.COUNTS, "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_entry_is_made_again_with_a_warning(home, capsys, name, damage):
    whole = build().train.fingerprint
    (entry,) = entries(home)
    (entry / name).write_bytes((entry / name).read_bytes()[:-8]) if damage == "cut" else (entry / name).unlink()
    capsys.readouterr()
    assert build().train.fingerprint == whole
    assert f"Warning: {entry}: damaged (" in capsys.readouterr().out
    build()
    assert capsys.readouterr().out == ""


def test_a_mistake_leaves_nothing_behind(home):
    Path("a.jsonl").write_text(rows(40) + '{"instruction": "a"}\n')
    with pytest.raises(DataError, match=r'a\.jsonl:41: no column "output"'):
        build()
    assert entries(home) == []


def test_a_file_that_changes_while_it_is_read_is_refused(home, monkeypatch):
    read = tokenise.stream_rows

    def growing(*arguments):
        yield from read(*arguments)
        with Path("a.jsonl").open("a") as file:
            file.write(rows(1))

    monkeypatch.setattr(tokenise, "stream_rows", growing)
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        build()
    assert entries(home) == []


def test_a_pipe_is_refused(home):
    os.mkfifo("b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: a pipe"):
        build("b.jsonl")


def test_the_cache_can_lie_anywhere(home, tmp_path):
    build(cache=str(tmp_path / "here" / "there"))
    assert len(entries(tmp_path / "here" / "there")) == 1 and not home.exists()


def test_a_directory_that_cannot_be_used_is_named(home):
    with pytest.raises(DataError, match=r"data\.cache a\.jsonl: cannot be used: File exists; set data\.cache"):
        build(cache="a.jsonl")


def test_without_a_place_for_it_a_run_keeps_its_tokens_to_itself(home, monkeypatch, capsys):
    monkeypatch.setenv("JAXTUNE_CACHE", str(home / "a.jsonl" / "x"))
    home.mkdir(parents=True)
    (home / "a.jsonl").write_text("")
    assert build().train.rows > 0
    assert "cannot be written (Not a directory); tokens are kept for this run alone" in capsys.readouterr().out


def test_without_any_place_a_run_is_refused_with_what_to_set(home, monkeypatch):
    monkeypatch.setenv("JAXTUNE_CACHE", str(home.parent.parent / "a.jsonl" / "x"))
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    cache._temporary.cache_clear()
    with pytest.raises(ConfigError, match="set TMPDIR to a directory that you may write to"):
        build()


@pytest.mark.parametrize("place", [None, "~/tokens"])
def test_without_a_home_no_directory_is_called_by_its_sign(home, monkeypatch, capsys, place):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("JAXTUNE_CACHE", place) if place else monkeypatch.delenv("JAXTUNE_CACHE")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where HOME is not set and nobody knows the user
    assert build().train.rows > 0
    assert ": your home directory cannot be found; set HOME, or give the whole path; tokens are kept for this run" in (
        capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match=r"^~/x: your home directory cannot be found"):
        build(cache="~/x")
    assert not Path("~").exists()


def test_an_entry_on_a_disk_that_is_only_read_is_used(home, no_reading, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    whole = build().train.fingerprint
    no_reading()
    monkeypatch.setattr("os.utime", refuse)
    assert build(cache=str(home)).train.fingerprint == whole


def test_a_full_disk_is_told(home, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_manifest", full)
    with pytest.raises(DataError, match=r"cannot be used: No space left on device; set data\.cache"):
        build()
    assert entries(home) == []


CHILD = """
import sys, time
from jaxtune.data import cache, tokenise
from tests.data.test_cache import build
read = tokenise.stream_rows
def slow(*arguments):
    for number, row in enumerate(read(*arguments)):
        if number == 20:
            print("half", flush=True)
            time.sleep(float(sys.argv[1]))
        yield row
tokenise.stream_rows = slow
print(build().train.fingerprint, flush=True)
"""


def start(seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(seconds)]
    return subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True)


def test_a_kill_in_the_middle_leaves_nothing_that_is_used(home):
    child = start(600)
    assert child.stdout.readline() == "half\n"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    (left,) = entries(home)
    assert left.name.endswith(cache.PARTIAL)
    expected = build(cache="elsewhere").train.fingerprint
    assert build().train.fingerprint == expected
    assert [path.suffix for path in entries(home)] == [""], "what the dead one left is gone"


def test_of_two_processes_one_builds_and_the_other_waits(home, capsys):
    child = start(2)
    assert child.stdout.readline() == "half\n"
    mine = build().train.fingerprint
    assert "Another process tokenises a.jsonl; waiting for it ..." in capsys.readouterr().out
    assert child.communicate()[0] == f"{mine}\n"
    assert len(entries(home)) == 1


def test_two_that_know_of_no_lock_get_the_same(home, monkeypatch):
    """As on a file system without locks: the second to come discards its own."""
    child = start(5)
    assert child.stdout.readline() == "half\n"
    monkeypatch.setattr(cache, "try_lock", lambda _: None)
    mine = build().train.fingerprint
    assert child.communicate()[0] == f"{mine}\n"
    assert len(entries(home)) == 1


class TestWorkers:
    """Rows that other processes tokenise."""

    @pytest.fixture(autouse=True)
    def many(self, home, monkeypatch):
        monkeypatch.setattr(tokenise, "MANY", (10, 1 << 20))
        monkeypatch.setattr(tokenise, "cores", lambda: 2)
        monkeypatch.setattr(encode, "CHUNK", 4)

    @pytest.mark.parametrize(("tok", "max_length"), [(word_tokenizer, 16), (tokenizer, 32)])
    def test_they_make_the_same_tokens_in_the_same_order(self, tok, max_length, monkeypatch, capsys):
        settings = {"tok": tok(), "max_length": max_length, "system": "a"}
        side_by_side = build(**settings, cache="one")
        told = capsys.readouterr().out
        assert "Tokenising a.jsonl with 2 processes ...\n40 rows in " in told
        monkeypatch.setattr(tokenise, "cores", lambda: 1)
        alone = build(**settings, cache="two")
        assert side_by_side.train.fingerprint == alone.train.fingerprint
        assert side_by_side.sources[0].lengths == alone.sources[0].lengths
        assert side_by_side.sources[0].lengths.truncated > 0

    def test_a_terminal_shows_how_far_they_are(self, monkeypatch):
        from rich.console import Console

        from jaxtune import console

        monkeypatch.setattr(console, "console", Console(file=io.StringIO(), force_terminal=True, width=120))
        monkeypatch.setattr(tokenise, "cores", lambda: 1)
        build()
        text = console.console.file.getvalue()
        assert "Tokenising a.jsonl" in text and "40 rows" in text and "rows/s" in text and "0:00:00" in text

    def test_what_they_see_on_the_way_is_told(self):
        asked, answer = say("a", "b")
        talks = [*[[asked, answer]] * 20, [answer, asked, answer], [{**asked, "content": "a <|im_end|>"}, answer]]
        Path("b.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        data = build("b.jsonl", tok=tokenizer(MISTRAL), format="messages", on_bad_line="skip")
        counts = data.sources[0].lengths
        assert (counts.rows, counts.bad, counts.special) == (21, 1, 1)
        assert counts.bad_first[0].startswith("b.jsonl:21: the conversation begins with the assistant")
        assert counts.special_first == "b.jsonl:22 (<|im_end|>)"

    def test_texts_too(self, monkeypatch):
        settings = {"format": "text", "columns": {"text": "output"}}
        side_by_side = build(**settings, cache="one").train.fingerprint
        monkeypatch.setattr(tokenise, "cores", lambda: 1)
        assert build(**settings, cache="two").train.fingerprint == side_by_side

    def test_the_first_mistake_is_told_whoever_finds_it(self):
        Path("t.jinja").write_text("{{ raise_exception('no q') if messages[0].content == 'q' }}" + CHATML)
        lines = rows(40).splitlines()
        Path("a.jsonl").write_text("\n".join([*lines[:38], "{"]))
        with pytest.raises(DataError, match=r"^a\.jsonl:17: data\.template t\.jinja does not .* it says: no q$"):
            build(template="t.jinja")
        with pytest.raises(DataError, match=r"^a\.jsonl:39: not valid JSON"):
            build()

    def test_one_that_dies_is_told(self, monkeypatch):
        from jaxtune.data.workers import _Process

        ask = _Process.ask

        def dying(self, chunk):
            if chunk[0].where == "a.jsonl:21":
                self.kill()
                self._process.wait()
            return ask(self, chunk)

        monkeypatch.setattr(_Process, "ask", dying)
        with pytest.raises(DataError, match=r"a\.jsonl:21 to a\.jsonl:24: a process .* ended \(SIGKILL\); did the"):
            build()

    def test_one_that_fails_shows_where(self, monkeypatch):
        from jaxtune.data import workers

        monkeypatch.setattr(workers, "asdict", lambda row: {"nonsense": 1})
        with pytest.raises(RuntimeError, match=r"a\.jsonl:1 to .* failed:\nTraceback(.|\n)*nonsense"):
            build()

    def test_none_outlives_the_one_that_asked(self):
        """Told nothing more, or heard by nobody, it ends without a word."""
        told = json.dumps(hello(DataSection(path="a"), word_tokenizer(), False, 0)).encode()
        command, pipe = [sys.executable, "-m", "jaxtune.data.worker"], subprocess.PIPE
        with subprocess.Popen(command, env=child_environment(), stdin=pipe, stdout=pipe, stderr=pipe) as deaf:
            deaf.stdout.close()
            deaf.stdin.write(told + b"\n[]\n")
            deaf.stdin.close()
            assert deaf.stderr.read() == b"" and deaf.wait() == 1
        done = subprocess.run(command, env=child_environment(), input=told + b"\n", capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"{}\n", b"")

    def test_they_import_no_jax(self, run_python):
        code = "import jaxtune.data.worker, sys; print({'jax', 'grain', 'torch', 'transformers'} & set(sys.modules))"
        assert run_python(code).stdout == "set()\n"


def test_memory_does_not_grow_with_the_rows(home, monkeypatch):
    monkeypatch.setattr(tokenise, "MANY", (16, 1 << 20))
    monkeypatch.setattr(tokenise, "cores", lambda: 1)
    monkeypatch.setattr(encode, "CHUNK", 16)

    def peak(count: int) -> int:
        with Path(f"{count}.jsonl").open("w") as file:
            for first in range(0, count, 100):
                file.write(rows(100, first))
        build("a.jsonl")  # what is loaded once
        tracemalloc.start()
        build(f"{count}.jsonl", packing=False, train={"steps": 1})
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    small, large = peak(500), peak(2000)
    kept = 1500 * 60  # an order, lengths and starts: some numbers an example, whatever its length
    assert large < small + kept, (small, large)


def test_another_user_may_read_an_entry(home):
    build()
    (entry,) = entries(home)
    umask = os.umask(0)
    os.umask(umask)
    assert entry.stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_entry_that_is_used_is_young(home):
    build()
    (entry,) = entries(home)
    os.utime(entry, (0, 0))
    build()
    assert entry.stat().st_mtime > time.time() - 60
