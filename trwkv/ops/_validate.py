"""One validator per kind of argument. Each raises before anything is computed, naming argument, expected and got."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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
    if x.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {spec} = {list(shape)}; got {list(x.shape)}")


def require_same_device(**tensors: Tensor | None) -> None:
    devices = [x.device for x in tensors.values() if x is not None]
    if devices.count(devices[0]) != len(devices):
        present = {name: x.device for name, x in tensors.items() if x is not None}
        got = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"{', '.join(present)}: expected all on one device; got {got}")


def require_flag(name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected True or False; got {describe(x)}")


def require_cu_seqlens(x: object, device: torch.device) -> None:
    """Type, shape and place of `cu_seqlens`; its values are for `sequence_bounds` to check."""
    if not isinstance(x, Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor; got {describe(x)}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected one of int32, int64; got {describe(x)}")
    if x.ndim != 1 or x.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape [N + 1] with N at least 1; got {list(x.shape)}")
    if x.device != device and x.device.type != "cpu":
        raise ValueError(
            f"cu_seqlens: expected on {device}, where the tokens are, or on the CPU; got {describe(x)}"
        )


_known_bounds: WeakIdKeyDictionary = WeakIdKeyDictionary()


def sequence_bounds(cu_seqlens: Tensor, T: int) -> list[int]:
    """The values of `cu_seqlens`, checked to rise from 0 to T.

    A tensor on a GPU is read once, at its first use, and not again until it is changed: the layers of a model that
    share it wait for the device once. One on the CPU makes nothing wait.
    """
    if (
        cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference()
    ):  # an inference tensor does not count its changes
        bounds = cu_seqlens.tolist()
    else:
        version, bounds = _known_bounds.get(cu_seqlens, (None, None))
        if version != cu_seqlens._version:
            bounds = cu_seqlens.tolist()
            _known_bounds[cu_seqlens] = cu_seqlens._version, bounds
    if bounds[0] != 0 or bounds[-1] != T or any(a > b for a, b in pairwise(bounds)):
        got = (
            str(bounds)
            if len(bounds) <= 12
            else f"{bounds[:6]} ... {bounds[-6:]}".replace("] ... [", ", ..., ")
        )
        raise ValueError(
            f"cu_seqlens: expected values that rise from 0 to T = {T}, none below the one before; got {got}"
        )
    return bounds
