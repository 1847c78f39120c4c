"""Token shift and time mix in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def token_shift(x: Tensor, previous: Tensor | None = None) -> Tensor:
    """The sequence moved one step later: `shifted[:, t] = x[:, t-1]`, `shifted[:, 0] = previous`.

    Args:
        x: [B, T, ...], any dtype.
        previous: [B, ...], the token before the first one; None is zeros (the start of a sequence).

    Returns:
        A tensor of x's shape and dtype.
    """
    first = torch.zeros_like(x[:, :1]) if previous is None else previous.unsqueeze(1).to(x.dtype)
    return torch.cat([first, x[:, :-1]], dim=1)[:, : x.shape[1]]  # of no token: none


def time_mix(shifted: Tensor, delta: Tensor, mix: Tensor) -> Tensor:
    """`mix * x + (1 - mix) * shifted`, written as `shifted + mix * delta` with `delta = x - shifted`.

    RWKV-4 (arXiv 2305.13048), equations 11 to 15. `delta` is computed once for all the mixes of a block.

    Args:
        shifted: [B, T, C] or [B, T, P, C].
        delta: x - shifted, same shape.
        mix: [C], or [P, C] for one mix per perspective.

    Returns:
        The shape of `shifted`, with a P axis added before C when mix has one and `shifted` has none.
    """
    if mix.ndim == 2 and shifted.ndim == 3:
        shifted, delta = shifted.unsqueeze(2), delta.unsqueeze(2)
    return torch.addcmul(shifted, mix.to(shifted.dtype), delta)


def token_shift_mix_plain(x: Tensor, mixes: Sequence[Tensor], previous: Tensor | None) -> tuple[Tensor, ...]:
    """All mixes of one block; differentiable to any order."""
    shifted = token_shift(x, previous)
    delta = x - shifted
    return tuple(time_mix(shifted, delta, mix) for mix in mixes)
