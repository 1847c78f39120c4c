"""Checks of arguments that several layers take, and the configuration too."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trwkv.ops._validate import require_cu_seqlens, require_shape, sequence_bounds


def check_whole_number(name: str, value: object) -> None:
    """Raise ValueError unless it is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1; got {value!r}")


def chosen_vectors(names: Sequence[str], valid: Sequence[str], where: str = "") -> list[str]:
    """`perspective_vectors`, in the order of `valid`; ValueError for a string, or for a name that is not valid."""
    if isinstance(names, str) or not set(names) <= set(valid):
        raise ValueError(
            f"perspective_vectors: {where}expected a list of some of {', '.join(valid)}; got {names!r}"
        )
    return [name for name in valid if name in names]


def check_differ(names: Sequence[str], n_perspectives: int) -> None:
    """Raise ValueError where P > 1 perspectives have no vector of their own."""
    if n_perspectives > 1 and not names:
        raise ValueError(
            f"perspective_vectors: expected at least one with n_perspectives = {n_perspectives}; "
            "got none (the perspectives would be the same)"
        )


def check_input(
    x: Tensor,
    channels: int,
    n_streams: int | None,
    *,
    mask: Tensor | None,
    shift_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError (TypeError for a wrong cu_seqlens) unless a layer's arguments fit each other.

    x is [B, T, C], or [B, T, P, C] with `n_streams` = P. The values of cu_seqlens are for `check_bounds`.
    """
    axes, names = ((channels,), "C") if n_streams is None else ((n_streams, channels), "P, C")
    if x.ndim != 2 + len(axes) or x.shape[2:] != axes:
        expected = ", ".join(["B", "T", *map(str, axes)])
        raise ValueError(f"x: expected shape [{expected}]; got {list(x.shape)}")
    B, T = x.shape[:2]
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("mask, cu_seqlens: expected at most one of them; got both")
        require_cu_seqlens(cu_seqlens, x.device)
        if B != 1:
            raise ValueError(f"x: expected B = 1 with cu_seqlens; got shape {list(x.shape)}")
    if mask is not None:
        require_shape("mask", mask, "[B, T]", (B, T))
    if shift_state is not None:
        letter, n_sequences = ("B", B) if cu_seqlens is None else ("N", cu_seqlens.shape[0] - 1)
        require_shape("shift_state", shift_state, f"[{letter}, {names}]", (n_sequences, *axes))


def check_bounds(cu_seqlens: Tensor, T: int) -> None:
    """Raise ValueError unless the values rise from 0 to T, for a layer without an op that does.

    Where there are values to look at: not in tracing, nor while a CUDA graph is captured.
    """
    is_traced = torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor or cu_seqlens.is_meta
    if not is_traced and not (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        sequence_bounds(cu_seqlens, T)
