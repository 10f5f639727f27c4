"""A command asks for large pages before it starts, once, and is otherwise the command that was given."""

import json
import os
import subprocess
import sys

import pytest

from jaxtune.huge_pages import POLICY, TUNABLES, with_tunable


@pytest.fixture
def policy(tmp_path):
    def written(text):
        (tmp_path / "enabled").write_text(text)
        return tmp_path / "enabled"

    return written


def test_the_tunable_is_put_beside_what_is_there(policy):
    on_request = policy("always [madvise] never\n")
    assert with_tunable({"HOME": "/h"}, on_request) == {"HOME": "/h", TUNABLES: "glibc.malloc.hugetlb=1"}
    given = {TUNABLES: "glibc.malloc.arena_max=2"}
    assert with_tunable(given, on_request) == {TUNABLES: "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n"])
def test_nothing_is_done_where_it_would_change_nothing(policy, text, tmp_path):
    assert with_tunable({}, policy(text)) is None
    assert with_tunable({}, tmp_path / "absent") is None


def test_a_users_own_setting_is_kept(policy):
    assert with_tunable({TUNABLES: "glibc.malloc.hugetlb=0"}, policy("[madvise]")) is None


@pytest.mark.skipif(with_tunable({}) is None, reason="this system gives no large pages on request")
def test_the_process_that_starts_anew_is_the_same_command_with_large_pages():
    code = """
import json, os, sys
from jaxtune.huge_pages import start_anew
print("started", os.getpid(), flush=True)
start_anew()
block = b"1" * (64 << 20)
pages = [line.split()[1] for line in open("/proc/self/smaps") if line.startswith("AnonHugePages")]
print(json.dumps({"arguments": sys.argv, "input": sys.stdin.read(), "kilobytes": sum(map(int, pages))}))
"""
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    command = [sys.executable, "-c", code, "two words", ""]
    done = subprocess.run(command, env=environment, input="given", capture_output=True, text=True, check=True)
    first, second, last = done.stdout.splitlines()
    assert first == second, "one process, started twice"
    found = json.loads(last)
    assert found["arguments"] == ["-c", "two words", ""] and found["input"] == "given"
    assert found["kilobytes"] >= 32 << 10, POLICY.read_text()


@pytest.mark.parametrize("module", [["jaxtune"], ["jaxtune.train"]], ids=["jaxtune", "jaxtune.train"])
@pytest.mark.skipif(with_tunable({}) is None, reason="this system gives no large pages on request")
def test_commands_start_anew(module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, sys\nprint('start', os.environ.get({TUNABLES!r}), file=sys.stderr)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", *module, "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    starts = [line for line in done.stderr.splitlines() if line.startswith("start ")]
    assert starts == ["start None", "start glibc.malloc.hugetlb=1"]
    assert "Usage" in done.stdout
