"""Small files are read with limits, and names stay inside their directory."""

import errno
from pathlib import Path

import pytest

from jaxtune import files
from jaxtune.errors import ConfigError, ModelError
from jaxtune.files import check_new, expanded, inside, read_json, sole_writer, write_whole


def test_a_json_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, "é"], "b": {}}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", ModelError) == {"a": [1, "é"], "b": {}}


@pytest.mark.parametrize("content", [b"", b"[1]", b'"text"', b'{"a": Infinity}', b'{"a": -NaN}', b"\xff", b"{" * 10**5])
def test_what_is_no_json_object_is_the_callers_error_and_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.json: "):
        read_json(tmp_path / "a.json", ConfigError)


def test_a_file_past_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 5)
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(ModelError, match="8 bytes; at most 5"):
        read_json(tmp_path / "a.json", ModelError)


def test_a_directory_in_the_files_place_is_named(tmp_path):
    with pytest.raises(ModelError, match="Is a directory"):
        read_json(tmp_path, ModelError)


def test_a_home_that_cannot_be_found_is_told_and_other_users_names_stand(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for path in ("~", "~/runs", Path("~/runs")):
        with pytest.raises(ConfigError, match="your home directory cannot be found; set HOME, or give the whole path"):
            expanded(path)
    assert [expanded(path) for path in ("~me/runs", "./~")] == [Path("~me/runs"), Path("./~")]


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/a", "a/b", "a\\b", "a\0", None, 3, "./a", "a/"])
def test_only_bare_names_are_inside(tmp_path, name):
    with pytest.raises(ModelError, match="index: file name"):
        inside(tmp_path, name, ModelError, "index")


@pytest.mark.parametrize("name", ["a", "a..b", "..a", "model-00001-of-00002.safetensors", "é x"])
def test_a_bare_name_is_inside_whether_or_not_the_file_exists(tmp_path, name):
    assert inside(tmp_path, name, ModelError, "index") == tmp_path / name


def test_links_are_followed_and_a_linked_directory_is_no_escape(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "real").write_text("")
    (model / "near").symlink_to("real")
    (model / "far").symlink_to("/etc/passwd")
    (tmp_path / "alias").symlink_to("model")
    for directory in (model, tmp_path / "alias"):
        assert inside(directory, "near", ModelError, "here") == directory / "near"
        with pytest.raises(ModelError, match="/etc/passwd, outside"):
            inside(directory, "far", ModelError, "here")


def test_only_a_snapshot_of_the_hubs_cache_may_link_to_its_repository(tmp_path):
    for root, allowed in (("models--a--b", True), ("elsewhere", False)):
        snapshot = tmp_path / root / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (tmp_path / root / "blob").write_text("")
        (snapshot / "file").symlink_to("../../blob")
        (snapshot / "other").symlink_to("../../../outside")
        with pytest.raises(ModelError):
            inside(snapshot, "other", ModelError, "here")
        if allowed:
            assert inside(snapshot, "file", ModelError, "here").exists()
        else:
            with pytest.raises(ModelError):
                inside(snapshot, "file", ModelError, "here")


def test_a_name_that_is_too_long_cannot_be_made_and_is_told(tmp_path):
    with pytest.raises(ModelError, match="nnn: cannot be made: File name too long"):
        check_new(tmp_path / ("n" * 300), ModelError)
    (tmp_path / "empty").mkdir()
    check_new(tmp_path / "empty", ModelError)


@pytest.mark.parametrize("name", [".", "here", "..", "new/.."])
def test_the_working_directory_is_not_replaced_though_it_is_empty(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    told = "is there already" if ".." in name else "is the working directory, which cannot be replaced"
    with pytest.raises(ModelError, match=f"{told}; give a "):
        check_new(tmp_path / name if name == "here" else Path(name), ModelError)


def test_a_mount_point_is_not_replaced_though_it_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.files.os.path.ismount", lambda path: path == tmp_path)
    with pytest.raises(ModelError, match="is a mount point, which cannot be replaced; give a directory inside it"):
        check_new(tmp_path, ModelError)
    check_new(tmp_path / "inside", ModelError)


def test_a_new_directory_has_one_writer_at_a_time(tmp_path):
    out = tmp_path / "deep" / "out"
    with sole_writer(out, ModelError):
        with pytest.raises(ModelError, match="out: another process writes it; wait for it or stop it"):
            with sole_writer(out, ModelError):
                pass
        with sole_writer(tmp_path / "deep" / "another", ModelError):
            pass
        out.mkdir()
        (out / "whole").write_text("")
    with pytest.raises(ModelError, match="out: is there already; give a new directory"):
        with sole_writer(out, ModelError):
            pass
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_lock_of_a_killed_writer_is_free_and_one_that_is_taken_away_is_none(tmp_path, monkeypatch):
    (tmp_path / ".out.lock").write_text("")
    with sole_writer(tmp_path / "out", ModelError):
        pass
    assert list(tmp_path.iterdir()) == []

    def gone(_):
        (tmp_path / ".out.lock").unlink()
        return True

    monkeypatch.setattr(files, "try_lock", gone)
    with pytest.raises(ModelError, match="another process writes it"):
        with sole_writer(tmp_path / "out", ModelError):
            pass


def test_a_writer_without_locks_goes_on_and_one_without_a_place_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match=r"file/out: cannot be written: .*File exists"):
        with sole_writer(tmp_path / "file" / "out", ModelError):
            pass
    monkeypatch.setattr(files, "try_lock", lambda _: None)
    with sole_writer(tmp_path / "out", ModelError):
        (tmp_path / "out").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("page")
    write_whole(tmp_path / "link", "old")
    write_whole(Path("/dev/null"), "nothing")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "page").read_text() == "old"
    assert not Path("/dev/null").is_file()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jaxtune.files.os.fsync", full)  # of what was written
    for name in ("page", "another"):
        with pytest.raises(OSError, match="No space left"):
            write_whole(tmp_path / name, "new")
    assert {path.name for path in tmp_path.iterdir()} == {"link", "page"}
    assert (tmp_path / "page").read_text() == "old"
