"""RWKV-4 files of rwkv.cpp: the "ggmf" container, versions 100 and 101, with float32 and float16 tensors.

Little-endian int32 throughout. A header: magic, version, n_vocab, n_embed, n_layer, type of the matrices. Then, until
the file ends, every tensor: number of dimensions, length of its name, type (0: float32, 1: float16), the dimensions
from the last to the first, the name, the values. The time_* vectors lie there without axes of length one, and
time_decay as -exp(time_decay), what the recurrence needs. Read back, that is the same to the bit, and time_decay
itself to 6e-8 (float32).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MAGIC = 0x67676D66
VERSIONS = (100, 101)
_TYPES = (torch.float32, torch.float16)
_HEADER, _TENSOR = struct.Struct("<6i"), struct.Struct("<3i")
_MAX_NAME = 128


def is_ggmf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == struct.pack("<i", MAGIC)


def read_ggmf(path: Path) -> dict[str, Tensor]:
    """Tensors by their official names and shapes.

    Raises:
        ValueError: another version, quantised tensors, or a file that is damaged or contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        _, version, n_vocab, n_embed, n_layer, kind = _HEADER.unpack(_read(file, _HEADER.size, path))
        if version not in VERSIONS:
            raise ValueError(f"{path}: expected ggmf version 100 or 101; got {version}")
        if kind not in (0, 1):
            raise ValueError(
                f"{path}: expected float32 or float16 tensors (type 0 or 1); got type {kind}: quantised?"
            )
        tensors = dict(_tensors(file, size, path))
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.") and name.count(".") > 1}
    embedding = list(tensors["emb.weight"].shape) if "emb.weight" in tensors else None
    if embedding != [n_vocab, n_embed] or len(blocks) != n_layer:
        raise ValueError(
            f"{path}: its header says {n_vocab} tokens, {n_embed} channels, {n_layer} layers; "
            f"it holds emb.weight {embedding} and {len(blocks)} layers"
        )
    return {name: _official(name, x, path) for name, x in tensors.items()}


def write_ggmf(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors of official names and shapes: matrices as float16 if they are that, all else as float32."""
    vocab_size, hidden_size = state["emb.weight"].shape
    n_layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    kind = _TYPES.index(torch.float16 if state["emb.weight"].dtype == torch.float16 else torch.float32)
    with path.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, VERSIONS[-1], vocab_size, hidden_size, n_layers, kind))
        for name, x in state.items():
            if ".time_" in name:
                x = x.reshape(-1)
            if name.endswith("time_decay"):
                x = -torch.exp(x.float())
            dtype = x.dtype if x.ndim > 1 and x.dtype == torch.float16 else torch.float32
            key = name.encode()
            file.write(_TENSOR.pack(x.ndim, len(key), _TYPES.index(dtype)))
            file.write(struct.pack(f"<{x.ndim}i", *reversed(x.shape)) + key)
            file.write(x.detach().to("cpu", dtype).contiguous().numpy().tobytes())


def _tensors(file: BinaryIO, size: int, path: Path) -> Iterator[tuple[str, Tensor]]:
    names: set[str] = set()
    while file.tell() < size:
        n_dims, length, kind = _TENSOR.unpack(_read(file, _TENSOR.size, path))
        if n_dims not in (1, 2) or not 0 < length <= _MAX_NAME:
            raise ValueError(f"{path}: damaged: a tensor of {n_dims} dimensions and a name of {length} bytes")
        shape = struct.unpack(f"<{n_dims}i", _read(file, 4 * n_dims, path))[::-1]
        key = _read(file, length, path)
        name = key.decode("ascii", errors="replace")
        if not (name.isascii() and name.isprintable()):
            raise ValueError(f"{path}: damaged: a tensor's name is {key!r}")
        if kind not in (0, 1):
            raise ValueError(
                f"{path}: {name}: expected float32 or float16 (type 0 or 1); got type {kind}: quantised?"
            )
        if name in names:
            raise ValueError(f"{path}: damaged: {name} comes twice")
        names.add(name)
        dtype = _TYPES[kind]
        n_bytes = dtype.itemsize
        for n in shape:
            n_bytes *= n
        if min(shape) < 1 or n_bytes > size - file.tell():
            raise ValueError(f"{path}: damaged: {name} of shape {list(shape)} does not fit into the file")
        values = bytearray(_read(file, n_bytes, path))
        yield name, torch.frombuffer(values, dtype=dtype).view(shape)


def _read(file: BinaryIO, n: int, path: Path) -> bytes:
    data = file.read(n)
    if len(data) < n:
        raise ValueError(f"{path}: incomplete: it ends in the middle of something")
    return data


def _official(name: str, x: Tensor, path: Path) -> Tensor:
    if name.endswith("time_decay"):
        if not (torch.isfinite(x) & (x < 0)).all():
            raise ValueError(
                f"{path}: {name}: expected finite negative log decays; got {x.min().item():g} to {x.max().item():g}"
            )
        return _time_decay(x.float())
    return x.view(1, 1, -1) if ".time_mix" in name else x


def _time_decay(w: Tensor) -> Tensor:
    """log(-w), rounded so that the model's own `-exp(time_decay)`, in float32, is w again to the bit."""
    exact = torch.log(-w.double())
    result = exact.float()
    for step in (2**-25, -(2**-25), 2**-24, -(2**-24)):
        other = (exact + step).float()
        result = torch.where((torch.exp(result) != -w) & (torch.exp(other) == -w), other, result)
    return result
