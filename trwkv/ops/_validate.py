"""One validator per kind of argument. Each raises before anything is computed, naming argument, expected and got."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {list(x.shape)}, {x.dtype} on {x.device}"
    return f"{type(x).__name__} {x!r:.60}"


def require_tensor(name: str, x: object, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {describe(x)}")
    if x.dtype not in dtypes:
        valid = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected one of {valid}; got {describe(x)}")


def require_shape(name: str, x: Tensor, spec: str, shape: Sequence[int]) -> None:
    """`spec` is how the shape is written in the documentation, `shape` what it comes to here."""
    if x.ndim != len(shape) or any(a != b for a, b in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected shape {spec} = {list(shape)}; got {list(x.shape)}")


def require_same_device(**tensors: Tensor | None) -> None:
    present = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(present.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"{', '.join(present)}: expected all on one device; got {got}")


def require_flag(name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected True or False; got {describe(x)}")
