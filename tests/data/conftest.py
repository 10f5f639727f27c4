"""What the tests of data files share."""

import pytest

from jaxtune.data.sources import read_records
from jaxtune.errors import DataError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, bytes or text) -> the file's bare name, in the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: bytes | str) -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def message(path: str) -> str:
    """What is said of a file that is refused."""
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    return str(caught.value)
