"""Token shift: each token sees itself and the token before it, mixed per channel."""

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


def last_token(x: Tensor, previous: Tensor | None = None) -> Tensor:
    """What `token_shift` of the next tokens takes for `previous`: the last of x, or `previous` where x has none."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], *x.shape[2:]) if previous is None else previous
    return x[:, -1].clone()  # a view would keep the whole sequence alive


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


def absent(mask: Tensor, ndim: int) -> Tensor:
    """Where a bool mask [B, T] has no token, with axes of size one added up to `ndim`."""
    return ~mask.reshape(*mask.shape, *[1] * (ndim - 2))
