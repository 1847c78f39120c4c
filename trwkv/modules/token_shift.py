"""Token shift: each token sees itself and the token before it, mixed per channel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trwkv.ops._dispatch import resolve_backend
from trwkv.ops._library import is_plain_inference
from trwkv.ops.token_shift_mix.api import token_shift_mix_op
from trwkv.ops.token_shift_mix.plain import time_mix, token_shift, token_shift_mix_plain

__all__ = ["absent", "last_token", "shift_and_mix", "time_mix", "token_shift"]


def shift_and_mix(
    x: Tensor, mixes: Sequence[Tensor], previous: Tensor | None, backend: str
) -> Sequence[Tensor]:
    """`trwkv.ops.token_shift_mix` for a layer whose backend is `backend`.

    The kernel where that is "triton" and no gradient is wanted; plain PyTorch elsewhere, and in `torch.compile`, which
    makes one kernel of it and of what is around it.
    """
    if previous is not None:
        previous = previous.to(x.dtype)
    is_kernel_wanted = not torch.compiler.is_compiling() and is_plain_inference(x, *mixes, previous)
    if is_kernel_wanted and resolve_backend(backend, x.device, x.dtype) == "triton":
        return token_shift_mix_op(x, mixes, previous)
    return token_shift_mix_plain(x, mixes, previous)


def last_token(x: Tensor, previous: Tensor | None = None) -> Tensor:
    """What `token_shift` of the next tokens takes for `previous`: the last of x, or `previous` where x has none."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], *x.shape[2:]) if previous is None else previous
    return x[:, -1].clone()  # a view would keep the whole sequence alive


def absent(mask: Tensor, ndim: int) -> Tensor:
    """Where a bool mask [B, T] has no token, with axes of size one added up to `ndim`."""
    return ~mask.reshape(*mask.shape, *[1] * (ndim - 2))
