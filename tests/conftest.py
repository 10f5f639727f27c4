"""What every test stands on: an environment without network, tiny models, the real model, the command line.

There are eight fake CPU devices in every test process; arrays lie on the first unless a test says otherwise.
A process of its own, with `run_cli` or `run_python`, has as many as the test asks for: one by default.
"""

import atexit
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache"

# Before anything imports jax. Compiled programs are kept: a second run of the suite compiles next to nothing.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling is most of what a test with a tiny model takes, so nothing is optimised. XLA ends a process that names a
# flag which it does not know, as jaxlib 0.11 the first one here.
QUICK_COMPILER = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
UNOPTIMISED = "--xla_backend_optimization_level=0"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {QUICK_COMPILER} {UNOPTIMISED}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "JAXTUNE_CACHE" not in os.environ:
    os.environ["JAXTUNE_CACHE"] = tempfile.mkdtemp(prefix="jaxtune-tests-")
    atexit.register(shutil.rmtree, os.environ["JAXTUNE_CACHE"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:
    # torch would start a thread for each core in each worker.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# A process may have 65,530 (Linux's vm.max_map_count), of which each compiled program takes some; beyond, XLA aborts.
MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """What was compiled for the modules before is given up, once it is much."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data (huanhuan.json, the Qwen2.5 tokenizer) that may lie beside a checkout."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is not there: it holds real data that is no part of the repository")
    return path


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M-Instruct in three forms: one GGUF file and two Hugging Face directories in float32."""

    gguf: Path
    llama: Path
    qwen2: Path


@pytest.fixture(scope="session")
def smollm2() -> SmolLM2:
    """The pretrained model, fetched and converted once for a checkout; skips where it cannot be fetched."""
    from filelock import FileLock

    from tests.peer import write_smollm2

    home = CACHE / "smollm2"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):
        gguf = _fetch_gguf(home)
        converted = home / "hf"
        if not converted.exists():
            write_smollm2(gguf, home / "hf.partial")
            (home / "hf.partial").rename(converted)
    return SmolLM2(gguf, converted / "llama", converted / "qwen2")


def _fetch_gguf(home: Path) -> Path:
    tool = [sys.executable, str(REPOSITORY / "tools" / "get_demo_model.py"), str(home)]
    done = subprocess.run(tool, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(f"SmolLM2 cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    done.check_returncode()
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def libtpu() -> dict[str, str]:
    """The environment of a child process in which programs can be compiled for TPUs that are not there.

    libtpu is kept beside the tests' caches, not installed: where it is, JAX looks for a TPU at every start. Each JAX
    has its own.
    """
    from filelock import FileLock

    wanted = next(line.split(";")[0] for line in requires("jax") if line.startswith("libtpu"))
    home = CACHE / re.sub(r"[^\w.]+", "-", wanted.rstrip(".*"))
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "libtpu.lock"):
        if not home.exists():
            partial = home.with_name(home.name + ".partial")
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial), wanted]
            done = subprocess.run(install, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(
                    f"{wanted} cannot be fetched: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
                )
            partial.rename(home)
    return {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(home)])}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(family, **settings) -> the directory of a random Hugging Face model of 2 layers; do not write in it.

    The settings are those of tests/peer.py's write_tiny_model; the same ones give the same directory.
    """
    from tests.peer import write_tiny_model

    made: dict[str, Path] = {}

    def make(family: str = "qwen2", **settings) -> Path:
        name = f"{family} {sorted(settings.items())}"
        if name not in made:
            made[name] = write_tiny_model(tmp_path_factory.mktemp(family), family, **settings)
        return made[name]

    return make


@pytest.fixture
def layers_apart(monkeypatch):
    """From then on even tiny models that are loaded have their layers apart."""
    from jaxtune import loading

    monkeypatch.setattr(loading, "LARGE", 0)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tokenizer of every tiny model: byte-level BPE, ChatML."""
    from tests.peer import tokenizer

    return tokenizer()


@pytest.fixture
def forbid(monkeypatch):
    """forbid(path): whoever opens this file, lists this directory or looks into it is told that he may not. Modes of
    files do not stop root, as whom tests may run."""

    def make(path: Path) -> None:
        for name, is_it in (("open", path.__eq__), ("iterdir", path.__eq__), ("stat", lambda p: p.parent == path)):
            monkeypatch.setattr(Path, name, refusing(getattr(Path, name), is_it))

    def refusing(real, is_it):
        def call(path, *args, **options):
            if is_it(path):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **options)

        return call

    return make


def child_environment(devices: int = 1, env: dict[str, str] | None = None, optimised: bool = False) -> dict[str, str]:
    """The environment of a Python process that finds this checkout and sees `devices` CPU devices.

    optimised: for a model that is not tiny, whose steps take longer than compiling them.
    """
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILER} {'' if optimised else UNOPTIMISED}"
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path, **(env or {})}


@pytest.fixture(scope="session")
def run_python():
    """run_python(code, *args, cwd=None, timeout=300, **environment) -> the finished process, with its text.

    environment: as child_environment takes it.
    """

    def run(code: str, *args, cwd=None, timeout=300, **environment) -> subprocess.CompletedProcess:
        return _run(["-c", code, *args], cwd, timeout, environment)

    return run


@pytest.fixture(scope="session")
def run_cli():
    """run_cli(*args, module="jaxtune.train", cwd=None, timeout=300, **environment) -> the finished process.

    Runs `python -m MODULE ARGS`; check the process's returncode, stdout and stderr. environment: as child_environment
    takes it.
    """

    def run(*args, module="jaxtune.train", cwd=None, timeout=300, **environment) -> subprocess.CompletedProcess:
        return _run(["-m", module, *args], cwd, timeout, environment)

    return run


def _run(args, cwd, timeout, environment) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, args)]
    environment = child_environment(**environment)
    return subprocess.run(command, env=environment, cwd=cwd, timeout=timeout, capture_output=True, text=True)
