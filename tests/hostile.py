"""What every refusal of a hostile file has in common, and how such files are made."""

import contextlib
import io
import os
import pickle
import re
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trwkv.convert import read_rwkv4

MEMORY = 512 << 20  # what reading one may take beyond what the process has


@contextlib.contextmanager
def bounded_memory(n_bytes: int = MEMORY) -> Iterator[None]:
    """More than so many bytes of further address space, used or not, is an error."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def assert_refused(path: Path, message: str, trace: Path) -> None:
    """A ValueError that names the file and what is wrong with it; nothing was run, and no memory filled."""
    with bounded_memory(), pytest.raises(ValueError) as error:
        read_rwkv4(path)
    text = str(error.value)
    assert path.name in text
    assert re.search(message, text), text
    assert "memory" not in text, text  # it was refused before there was none left
    assert len(text) < 2000 and text.isprintable(), text
    assert not trace.exists(), "code of the file was run"


class Code:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


class Call:
    """Pickled, a call of `function` with these arguments."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


def saved(content: object, **options) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def rewritten(data: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes | None) -> bytes:
    """An archive of `torch.save` with some records replaced (None: left out), `data_0` being data/0."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(new, "w", compression) as archive:
        for name in old.namelist():
            key = name.partition("/")[2].replace("/", "_").replace(".", "_")
            content = records.get(key, old.read(name))
            if content is not None:
                archive.writestr(name, content)
    return new.getvalue()
