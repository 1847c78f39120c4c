"""Memory that shows misuse: poison where nothing was written yet, and guard bands around what may be written.

Bands hold bytes of ones: NaN in every floating type, -1 in integers. Fresh memory holds NaN (integers: -1).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from trwkv.testing.cases import Case

BAND = 256
"""Bytes before and after; a multiple of every alignment, so that kernels choose the same path as without."""


class Guard:
    """Buffers with a band before and after, to be checked in the end."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int, str]] = []

    def allocate(self, like: Tensor, label: str) -> Tensor:
        """Poisoned memory with the shape, strides, dtype and device of a tensor, between two bands."""
        extent = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
        size = extent * like.element_size()
        buffer = torch.full((2 * BAND + size + (-size) % 16,), 255, dtype=torch.uint8, device=like.device)
        self._buffers.append((buffer, size, label))
        inner = buffer[BAND : BAND + size].view(like.dtype)
        inner.fill_(float("nan") if like.is_floating_point() else -1 if like.dtype.is_signed else 255)
        return inner.as_strided(like.shape, like.stride())

    def copy(self, x: Tensor, label: str) -> Tensor:
        """x, strides kept, between two bands. (A stride of 0 stays one.)"""
        if not x.numel():
            return x
        guarded = self.allocate(x, label)
        distinct = [slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()]
        guarded[tuple(distinct)].copy_(x[tuple(distinct)])
        return guarded

    def check(self) -> None:
        for buffer, size, label in self._buffers:
            for band, side in ((buffer[:BAND], "before"), (buffer[BAND + size :], "after")):
                if not (band == 255).all():
                    raise AssertionError(f"{label}: memory was written {side} its first or last element")


@contextmanager
def poisoned_allocations() -> Iterator[Guard]:
    """Within the block, memory that is allocated uninitialised from Python is poison between bands.

    On leaving, all bands are checked.
    """
    guard = Guard()

    def guarded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def replacement(*args: Any, **options: Any) -> Tensor:
            plain = allocate(*args, **options)
            if not plain.numel() or plain.is_meta or type(plain) is not Tensor:
                return plain
            x = guard.allocate(plain, f"allocated, {list(plain.shape)} {plain.dtype}")
            return x.requires_grad_(plain.requires_grad)

        return replacement

    names = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
    patches = [mock.patch.object(owner, name, guarded(getattr(owner, name))) for owner, name in names]
    for patch in patches:
        patch.start()
    try:
        yield guard
    finally:
        for patch in reversed(patches):
            patch.stop()
    guard.check()


def guarded_inputs(case: Case, guard: Guard) -> Case:
    """The case with every input and incoming gradient between bands."""
    inputs = {name: guard.copy(x, name) for name, x in case.inputs.items()}
    grads = {name: guard.copy(x, f"gradient of {name}") for name, x in case.grads.items()}
    return Case(inputs, grads, case.axes, case.cu_seqlens, case.reverse)
