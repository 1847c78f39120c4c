"""Token shift and time mix in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def token_shift(x: Tensor, previous: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The sequence moved one step later: `shifted[:, t] = x[:, t-1]`, `shifted[:, 0] = previous`.

    Args:
        x: [B, T, ...], any dtype.
        previous: [B, ...], the token before the first one; None is zeros (the start of a sequence). [N, ...] with
            cu_seqlens.
        cu_seqlens: [N + 1] int32 or int64, where packed sequences begin in the one row of x (B = 1), and T: each is
            shifted as if it were alone. Values that do not rise from 0 to T give nothing of use.

    Returns:
        A tensor of x's shape and dtype.
    """
    previous = None if previous is None else previous.to(x.dtype)
    if cu_seqlens is None:
        first = torch.zeros_like(x[:, :1]) if previous is None else previous.unsqueeze(1)
        return torch.cat([first, x[:, :-1]], dim=1)[:, : x.shape[1]]  # of no token: none
    sequence, is_first = packed_places(cu_seqlens, x.shape[1], x.device)
    is_first = is_first.view(1, -1, *[1] * (x.ndim - 2))
    shifted = token_shift(x)
    if previous is None:
        return shifted.masked_fill(is_first, 0)
    return torch.where(is_first, previous[sequence.clamp(max=len(previous) - 1)], shifted)


def packed_places(cu_seqlens: Tensor, n_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each token [T] of a packed row: the number of its sequence, and whether it is the first one there."""
    # From a GPU the values would not have arrived when they are read here, unless waited for.
    cu_seqlens = cu_seqlens.to(device, non_blocking=cu_seqlens.device.type == "cpu").contiguous()
    t = torch.arange(n_tokens, dtype=cu_seqlens.dtype, device=device)
    sequence = torch.searchsorted(cu_seqlens, t, right=True) - 1
    return sequence, t == cu_seqlens[sequence]


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


def token_shift_mix_plain(
    x: Tensor, mixes: Sequence[Tensor], previous: Tensor | None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, ...]:
    """All mixes of one block; differentiable to any order."""
    shifted = token_shift(x, previous, cu_seqlens)
    delta = x - shifted
    return tuple(time_mix(shifted, delta, mix) for mix in mixes)
